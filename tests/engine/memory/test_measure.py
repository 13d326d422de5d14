"""Measurements: fresh processes, real bytes, failures that end one row and not the report."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import Config
from engine.memory.measure import CudaMemory, Stepper, measure
from engine.memory.variant import END_TO_END, Variant, estimate_variant, four_variants, many_variants
from engine.network.chain import Chain, Unit
from engine.network.message import Message
from engine.task import Task
from engine.utilities.size import MIB
from tasks import load
from tests.toy import Toy, config

SMOKE = ["--config", "tasks/classification/configs/smoke.yaml", "--train.device", "cpu"]


class Hungry(nn.Module):
    """Runs out of memory, as a GPU would, or is killed, as a process would be."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.linear(x)  # shapes are inferred before anything is measured
        if self.how == "raises":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        if self.how == "asks":
            torch.empty(2**50)  # more than any machine has: the CPU's allocator has no error class of its own
        if self.how == "dies":
            os._exit(137)
        if self.how == "fails":
            raise KeyError("a mistake")
        return self.linear(x)


class HungryToy(Toy):
    def __init__(self, how: str) -> None:
        super().__init__(depth=2)
        self.how = how

    def build_chain(self, initial: bool = True) -> Chain:
        chain = super().build_chain(initial)
        model = nn.Sequential(Hungry(self.how), *[unit.module for unit in chain.units], chain.head.module)
        units = [Unit(f"unit{n}", module) for n, module in enumerate(model[:-1])]
        return Chain(model, units, Unit("output", model[-1]), Message({"x": torch.zeros(2, 6)}), layout="NLC")


def load_toy(argv: Sequence[str]) -> tuple[Config, Task]:
    """A loader for tests: ``--how`` names what goes wrong."""
    return config(local__blocks=2, train__device="cpu"), HungryToy(argv[-1])


@pytest.mark.slow
def test_a_variant_without_memory_does_not_end_the_others() -> None:
    found = measure([Variant(how, (how,)) for how in ("raises", "no", "dies", "asks")], [], load_toy, steps=2)
    assert "CUDA out of memory" in found["raises"].failure
    assert "can't allocate memory" in found["asks"].failure
    assert "exit code 137" in found["dies"].failure
    assert found["no"].failure == ""
    assert len(found["no"].seconds) == 2
    assert found["no"].memory is not None
    assert found["no"].memory.peak_bytes > 0
    assert found["raises"].memory is found["dies"].memory is found["asks"].memory is None


def test_any_other_failure_is_an_error_with_its_cause() -> None:
    with pytest.raises(ValueError, match=r"fails: block 0 failed at micro-batch 0: KeyError: 'a mistake'"):
        measure([Variant("fails", ("fails",))], [], load_toy, steps=1)


@pytest.mark.slow
def test_a_fresh_process_each_and_nothing_carried_over() -> None:
    """The same variant, measured after a larger one, needs what it needs alone; its resident set too."""
    small = ("--model.name", "resnet8", "--local.blocks", "2")
    variants = [Variant("large", ("--data.batch", "256", "--data.size", "48")), Variant("small", small)]
    after = measure(variants, SMOKE, load, steps=0)
    alone = measure(variants[1:], SMOKE, load, steps=0)
    large, one, other = after["large"].memory, after["small"].memory, alone["small"].memory
    assert large is not None
    assert one is not None
    assert other is not None
    assert one.footprint == other.footprint
    assert large.footprint.peak_bytes > 20 * one.footprint.peak_bytes
    grown = [memory.resident_bytes - memory.resident_before_bytes for memory in (large, one, other)]
    assert grown[1] == pytest.approx(grown[2], rel=0.3)
    # The system cannot have held fewer bytes than tensors had, and not vastly more.
    assert large.footprint.peak_bytes < grown[0] < 3 * large.footprint.peak_bytes + 200 * MIB


def test_the_peak_is_what_the_cpu_allocator_gave_out() -> None:
    """Held against torch's own profiler, which sees every allocation: operators' own room on top, and no less."""
    stepper = Stepper(*load([*SMOKE, "--model.name", "resnet14", "--local.blocks", "3", "--data.batch", "64"]))
    counted = stepper.memory().footprint.peak_bytes
    live = sum(t.untyped_storage().nbytes() for block in stepper.blocks for t in block.named_state().values())
    live += sum(
        value.untyped_storage().nbytes()
        for block in stepper.blocks
        for state in block.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    live += sum(t.untyped_storage().nbytes() for t in stepper.message.tensors())
    with torch.profiler.profile(profile_memory=True) as profiler:
        stepper.step()
    now = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    assert 0.97 * counted < live + highest < 1.25 * counted


def test_plain_sgd_has_no_state_to_wait_for() -> None:
    plain = ["--optimizer.momentum", "0", "--optimizer.nesterov", "false"]
    stepper = Stepper(*load([*SMOKE, *plain]))
    stepper.memory()
    assert stepper.blocks[0].next_sequence == 3, "one to warm up, two counted"


def test_a_loss_scaler_has_come_down_before_anything_is_counted() -> None:
    """Its first updates are left out, and with them the optimizer's state."""
    stepper = Stepper(*load([*SMOKE, "--local.precision", "fp16", "--data.batch", "4"]))
    for block in stepper.blocks:
        block.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    assert stepper.memory().footprint.peak["optimizer"] > 0
    assert all(block.skipped > 2 for block in stepper.blocks), "more than count_bytes alone would step"


def test_a_loss_scaler_that_never_comes_down_is_an_error() -> None:
    stepper = Stepper(*load([*SMOKE, "--local.precision", "fp16", "--data.batch", "4"]))
    stepper.blocks[0].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**90)
    with pytest.raises(ValueError, match="skipped all of 20 updates"):
        stepper.memory()


def test_compiled_code_cannot_be_counted_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="local.compile: the memory of compiled code can be measured on a GPU only"):
        Stepper(*load([*SMOKE, "--local.compile", "true"])).memory()


def test_variants_of_a_config_with_options_and_a_cut() -> None:
    argv = [*SMOKE, "--local.auxiliary", "glcan", "--local.auxiliary.depth", "1", "--local.cut", "[layer2.0]"]
    settings, _ = load(argv)
    variants = many_variants(settings, ["greedy"], [2, 3])
    assert [variant.name for variant in variants] == [
        *("end-to-end", "end-to-end + recompute", "end-to-end + offload"),
        *("glcan K=2", "glcan K=3", "greedy K=2", "greedy K=3"),
        *("glcan K=2 + recompute", "glcan K=3 + recompute"),
    ]
    loaded = {variant.name: load(variant.words(argv))[0].local for variant in variants}
    assert loaded["glcan K=3"].auxiliary == {"type": "glcan", "depth": 1}
    assert loaded["greedy K=3"].auxiliary == "greedy"
    assert (loaded["greedy K=3"].cut, loaded["greedy K=3"].blocks) == ([], 3)
    assert loaded["glcan K=2 + recompute"].recompute == "units"
    assert loaded["end-to-end + offload"].offload
    with pytest.raises(ValueError, match="end_to_end has no local rows"):
        many_variants(load([*argv, *END_TO_END.overrides])[0], [], [2])


@pytest.mark.parametrize(
    "words",
    [
        ["--local.auxiliary.depth", "1"],
        ["--local.auxiliary.depth=1", "--train.steps=3"],
        ["--local.auxiliary=glcan", "--local.auxiliary.depth=1"],
    ],
)
def test_another_network_does_not_get_the_first_ones_options(words: list[str]) -> None:
    argv = [*SMOKE, *words]
    own, other = many_variants(load(argv)[0], ["greedy"], [2])[3:5]
    assert load(own.words(argv))[0].local.auxiliary == {"type": "glcan", "depth": 1}
    settings, _ = load(other.words(argv))
    assert (settings.local.auxiliary, settings.train.steps) == ("greedy", 3)  # 3 is the smoke config's too


def test_an_end_to_end_config_has_its_own_two_rows() -> None:
    settings, _ = load([*SMOKE, "--local.schedule", "end_to_end"])
    assert [variant.name for variant in four_variants(settings)] == ["end-to-end", "end-to-end + recompute"]


class FakeNvml:
    """Two GPUs, numbered otherwise than CUDA does."""

    class NVMLError(Exception):
        pass

    used = (10 * MIB, 700 * MIB)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:
        return b"GPU-aa" if handle == 0 else "GPU-bb"

    def nvmlDeviceGetMemoryInfo(self, handle: int):
        class Info:
            used = FakeNvml.used[handle]

        return Info


def test_the_driver_is_asked_about_the_right_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES renumbers CUDA's devices, not NVML's. Real NVML: the test below, on a GPU."""
    from engine.memory.measure import _Used

    class Properties:
        uuid = "bb"

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    used = _Used()
    monkeypatch.setattr(FakeNvml, "used", (999 * MIB, 1200 * MIB))
    assert used.grown(torch.device("cuda:0")) == 500 * MIB
    Properties.uuid = "a part of a GPU"
    assert used.grown(torch.device("cuda:0")) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [[], ["--local.recompute", "units"], ["--local.offload", "true"]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prediction_is_what_the_gpu_allocated(more: list[str], precision: str, tmp_path: Path) -> None:
    argv = ["--config", "tasks/classification/configs/digits_resnet32_k16_glcan.yaml", "--train.device", "cuda"]
    argv += ["--data.batch", "1024", "--local.blocks", "4", "--local.precision", precision, *more]
    predicted = estimate_variant(Variant("", ()), argv, load).footprint.peak_bytes
    found = measure([Variant("x", ())], argv, load, steps=2, snapshots=tmp_path)["x"].memory
    assert found is not None
    assert isinstance(found.cuda, CudaMemory)
    assert predicted == pytest.approx(found.cuda.allocated_bytes, rel=0.05)
    assert found.footprint.peak_bytes <= found.cuda.allocated_bytes <= found.cuda.reserved_bytes
    assert found.cuda.used_bytes is None or found.cuda.used_bytes >= found.cuda.reserved_bytes
    assert (tmp_path / "x.pickle").stat().st_size > 1000
