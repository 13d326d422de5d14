"""Plans: optimal on chains small enough to try every cut, true on real networks, honest where nothing fits."""

import functools
import itertools
import json
from dataclasses import replace

import pytest

from engine.config import parse
from engine.memory.measure import Stepper
from engine.memory.plan import SLACK, Option, _micro_batches, check_free, make_plan, smallest_cut, write_plan
from engine.memory.profile import Profile
from engine.memory.tracker import MemoryTracker
from engine.memory.variant import END_TO_END, Variant, estimate_variant
from engine.memory.work import Speed
from engine.network.cut import best_bounds
from engine.task import evaluate
from engine.utilities.size import MIB, parse_size
from tasks import find_task, load
from tests.toy import Toy, config

SPEED = Speed(130e9, 14e9, 7e9)
CONFIG = ["--config", "tasks/classification/configs/digits_resnet32_k16_glcan.yaml"]


def planned(argv: list[str], budget: int):
    settings, _ = load(argv)
    return make_plan(settings, find_task("classification").build, budget, SPEED)


def bounds_of(option: Option, argv: list[str]) -> list[int]:
    chain = load(argv)[1].build_chain(initial=False)
    return [0, *(chain.index(name) for name in option.config.local.cut), len(chain)]


@pytest.mark.parametrize("text", ["4", "4G", "GiB", "-1GiB", "0MiB", "4 GiBs", "", "four GiB", "1e3MiB"])
def test_a_size_without_number_or_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--memory: .* is not a size; write a number above 0 and one of KiB, KB, MiB"):
        parse_size(text)


def test_sizes() -> None:
    assert parse_size("4GiB") == 4 * 2**30
    assert parse_size(" 1.5 GB ") == parse_size("1.5gb") == 1_500_000_000


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_dynamic_programming_finds_what_trying_every_cut_finds(blocks: int) -> None:
    weights = [5, 1, 4, 2, 8, 3]

    def cost(start: int, stop: int) -> tuple[float, float]:
        return sum(weights[start:stop]) + start, (stop - start) ** 2

    def value(bounds: list[int]) -> tuple[float, float]:
        costs = [cost(*pair) for pair in itertools.pairwise(bounds)]
        return max(c[0] for c in costs), sum(c[1] for c in costs)

    every = ([0, *inner, 6] for inner in itertools.combinations(range(1, 6), blocks - 1))
    heaviest, bounds = best_bounds(6, 6, cost)[blocks - 1]
    assert value(bounds) == min(map(value, every))
    assert heaviest == value(bounds)[0]


@functools.cache
def profile_of(*network: str) -> Profile:
    """A profile has all costs with recomputation and without, whatever the config says."""
    settings, task = load([*CONFIG, *network])
    return Profile(settings, task, SPEED)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "units"])
@pytest.mark.parametrize(
    "network",
    [
        ["--model.name", "resnet8", "--data.batch", "256"],
        pytest.param(
            ["--model.name", "resnet14", "--data.batch", "64", "--train.accumulate", "2", "--local.auxiliary", "dgl"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--model.name", "resnet32", "--data.batch", "256"], marks=pytest.mark.slow),
        pytest.param(
            ["--model.name", "timm:vit_tiny_patch16_224", "--data.size", "64", "--optimizer.name", "adamw"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.name", "timm:resnet18", "--data.size", "64", "--local.precision", "bf16"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_profile_is_close_to_the_estimate(network: list[str], recompute: str) -> None:
    """As close for every number of blocks as the planner takes it to be; it judges what it chooses for real."""
    argv = [*CONFIG, *network, "--local.recompute", recompute]
    profile = profile_of(*network)
    for blocks in (1, 3, len(profile)):
        bounds = best_bounds(len(profile), blocks, lambda i, j: ((j - i), 0))[-1][1]
        pairs = list(itertools.pairwise(bounds))
        names = [profile._plain.chain.units[start].name for start in bounds[1:-1]]
        overrides = ("--local.cut", json.dumps(names)) if blocks > 1 else ("--local.schedule", "end_to_end")
        estimate = estimate_variant(Variant("", overrides), argv, load, SPEED)
        fixed = profile.least + sum(profile.state(*pair) for pair in pairs)
        modelled = fixed + max(profile.peak(*pair, recompute) for pair in pairs)
        assert modelled == pytest.approx(estimate.footprint.peak_bytes, rel=SLACK - 1), blocks
        seconds = sum(profile.seconds(*pair, recompute) for pair in pairs)
        assert seconds == pytest.approx(estimate.step_seconds, rel=0.2), blocks


@pytest.mark.slow
def test_no_fewer_blocks_fit() -> None:
    """Every cut of a short network into fewer blocks, tried: none fits. Of those with as many, none is faster."""
    argv = [*CONFIG, "--model.name", "resnet14", "--data.batch", "64"]
    budget = int(0.45 * estimate_variant(END_TO_END, argv, load).footprint.peak_bytes)
    plan = planned(argv, budget)
    chosen = plan.chosen
    assert chosen.config.local.recompute == "none"
    assert chosen.peak_bytes <= budget
    names = [unit.name for unit in load(argv)[1].build_chain().units][1:]
    blocks = len(chosen.estimate.units)
    for count in range(1, blocks):
        for cut in itertools.combinations(names, count):
            estimate = estimate_variant(Variant("", ("--local.cut", json.dumps(list(cut)))), argv, load, SPEED)
            fits = estimate.footprint.peak_bytes <= budget
            assert not (fits and count + 1 < blocks), cut
            if fits:
                assert estimate.step_seconds > 0.99 * chosen.estimate.step_seconds, cut


def test_end_to_end_is_chosen_where_it_fits() -> None:
    plan = planned([*CONFIG, "--model.name", "resnet8"], 2**30)
    assert plan.chosen is plan.rivals[0]
    assert plan.chosen.config.local.schedule == "end_to_end"


@pytest.mark.slow
def test_the_micro_batch_is_the_last_resort() -> None:
    argv = [*CONFIG, "--model.name", "resnet8", "--data.batch", "64", "--data.subset", "640"]
    smallest = estimate_variant(Variant("", ("--local.blocks", "4")), argv, load).footprint.peak_bytes
    assert planned(argv, smallest).chosen.config.train.accumulate == 1
    plan = planned(argv, int(0.6 * smallest))
    assert plan.chosen.config.train.accumulate == 2
    assert plan.chosen.micro_batch == 32
    assert plan.chosen.peak_bytes <= plan.budget_bytes


@pytest.mark.slow
def test_what_cannot_be_is_said_with_what_can() -> None:
    argv = [*CONFIG, "--model.name", "resnet8", "--data.batch", "8", "--data.subset", "64"]
    with pytest.raises(ValueError, match=r"102\.4 KiB is less than the .* that parameters, buffers and"):
        planned(argv, MIB // 10)
    with pytest.raises(
        ValueError, match=r"no plan fits 921\.6 KiB; the smallest achievable is (.*) MiB \(.*\), where"
    ) as e:
        planned(argv, int(0.9 * MIB))
    size, block = str(e.value).split("achievable is ")[1].split(" MiB")[0], str(e.value)
    assert "sets it with" in block
    # What is said to be achievable is.
    assert planned(argv, int((float(size) + 0.1) * MIB)).chosen.peak_bytes <= (float(size) + 0.1) * MIB


def test_a_block_always_has_something_to_train() -> None:
    """Frozen units cannot stand alone, however well such a cut would fit."""

    class Frozen(Toy):
        def build_chain(self, initial: bool = True):
            chain = super().build_chain(initial)
            for unit in chain.units[:2]:
                unit.module.requires_grad_(False)
            return chain

    profile = Profile(config(), Frozen(depth=4), SPEED)
    assert [profile.trainable(0, stop) for stop in (1, 2, 3)] == [False, False, True]


def test_a_plan_is_a_config_that_train_reads(tmp_path) -> None:
    plan = planned([*CONFIG, "--model.name", "resnet8"], 40 * MIB)
    write_plan(plan, tmp_path / "plan.yaml")
    read = parse(type(plan.chosen.config), ["--config", str(tmp_path / "plan.yaml")])
    assert replace(read, output=plan.chosen.config.output) == plan.chosen.config
    assert (tmp_path / "plan.yaml").read_text().startswith("# Planned for 40.0 MiB: ")
    check_free(tmp_path / "plan.yaml")
    (tmp_path / "mine.yaml").write_text("task: classification\n")
    with pytest.raises(ValueError, match="exists and is not a plan"):
        check_free(tmp_path / "mine.yaml")


IMAGENET = ["imagenet_resnet101_k4_glcan.yaml", "--train.accumulate", "1"]


@pytest.mark.slow
def test_what_trains_in_a_budget_evaluates_in_it() -> None:
    """Evaluation took the whole batch at once, however small the micro-batches."""
    argv = [*CONFIG, "--model.name", "resnet8", "--data.batch", "256"]
    plan = planned(argv, 12 * MIB)
    chosen = plan.chosen
    assert chosen.micro_batch <= 64
    stepper = Stepper(chosen.config, find_task("classification").build(chosen.config))
    stepper.step()
    tracker = MemoryTracker()
    for block in stepper.blocks:
        tracker.add([*block.parameters(), *block.buffers()], "parameters")
        tracker.add((v for s in block.optimizer.state.values() for v in s.values() if v is not None), "optimizer")
    with tracker:
        task = find_task("classification").build(chosen.config)
        evaluate(task, stepper.schedule.predict)
    assert tracker.peak.bytes <= plan.budget_bytes


def test_micro_batches_of_one_are_planned_where_nothing_normalises_over_the_batch() -> None:
    settings, _ = load([*CONFIG, "--model.name", "timm:vit_tiny_patch16_224", "--data.batch", "4"])
    build = find_task("classification").build
    assert [each.train.accumulate for each in _micro_batches(settings, build)] == [1, 2, 4]
    settings.local.auxiliary = "dgl"  # has BatchNorm
    assert [each.train.accumulate for each in _micro_batches(settings, build)] == [1, 2]


@pytest.mark.slow
def test_the_smallest_cut_beats_equal_numbers_of_units() -> None:
    argv = ["--config", "tasks/classification/configs/imagenet_resnet101_k4_glcan.yaml"]
    config, _ = load(argv)
    assert smallest_cut(config, find_task("classification").build, 4, SPEED) == config.local.cut, "as the config says"
    even, own = (estimate_variant(Variant("", more), argv, load) for more in (("--local.cut", "[]"), ()))
    assert own.footprint.peak_bytes < 0.65 * even.footprint.peak_bytes


def test_a_plan_needs_no_data(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.classification.task.load_images", None)
    argv = ["--config", "tasks/classification/configs/cifar10_resnet32_k16_glcan.yaml", "--model.name", "resnet8"]
    assert planned(argv, 130 * MIB).chosen.config.train.accumulate > 1


# The promise: a third of end-to-end's memory, for the field's networks at full size; then two steps for real,
# at a batch this machine can hold, within the budget scaled to that batch.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "batch", "small"),
    [
        (["cifar10_resnet110_k55_glcan.yaml"], 1024, 16),
        (IMAGENET, 256, 16),
        ([*IMAGENET, "--model.name", "timm:vit_base_patch16_224"], 128, 16),
    ],
)
def test_a_third_of_end_to_end(words: list[str], batch: int, small: int) -> None:
    argv = ["--config", f"tasks/classification/configs/{words[0]}", *words[1:], "--data.batch", str(batch)]
    whole = estimate_variant(END_TO_END, argv, load).footprint.peak_bytes
    plan = planned(argv, whole // 3)
    chosen = plan.chosen
    assert chosen.peak_bytes <= whole // 3
    # Weights, their momenta and one block's gradients, twice at the update, do not scale with the batch.
    settings = replace(chosen.config, data=replace(chosen.config.data, batch=small))
    stepper = Stepper(settings, find_task("classification").build(settings))
    weights = [4 * sum(p.numel() for p in block.parameters()) for block in stepper.blocks]
    fixed = 2 * sum(weights) + 2 * max(weights)
    budget = fixed + (whole // 3 - fixed) * small / batch
    rival = estimate_variant(END_TO_END, [*argv, "--data.batch", str(small)], load).footprint.peak_bytes
    assert rival > budget, "end-to-end training would do as well"
    assert stepper.memory().footprint.peak_bytes <= budget
