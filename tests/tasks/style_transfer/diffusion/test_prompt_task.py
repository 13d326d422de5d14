"""Prompts of a frozen denoiser: diffusers' own step to the bit, by blocks, several artists, files."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from engine.network.message import Message
from tasks.run import open_run
from tasks.style_transfer.artbank.pipeline import ArtBankPipeline
from tasks.style_transfer.artbank.prompts import new_prompt as artbank_prompt
from tasks.style_transfer.diffusion.bank import PromptBank, load_bank
from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.images import write_image
from tasks.style_transfer.lsast.pipeline import LSASTPipeline
from tasks.style_transfer.lsast.prompts import PromptSpace
from tasks.style_transfer.lsast.prompts import new_prompt as lsast_prompt
from tests.ranks import run_ranks
from tests.runs import fit
from tests.tasks.style_transfer.diffusion.models import ARTBANK, LSAST, small, task_of
from tests.tasks.style_transfer.painters import noise
from tests.toy import blocks_of
from tools import evaluate, export, train

END_TO_END = ["--local.schedule", "end_to_end"]
NO_PICTURES = ["--pictures.count", "0"]
FORMS = {
    "artbank ssam": (ARTBANK, ["--prompt.tokens", "2"]),
    "artbank released": (ARTBANK, ["--prompt.form", "released"]),
    "lsast paper": (LSAST, []),
    "lsast released": (LSAST, ["--prompt.form", "released"]),
}
every_form = pytest.mark.parametrize("form", FORMS)
# The methods share the code of runs.
one_method = pytest.mark.parametrize("form", ["artbank ssam", pytest.param("lsast paper", marks=pytest.mark.slow)])
# One form of each: the other two differ in the prompts alone, which the step of every form shows to the bit.
both_methods = pytest.mark.parametrize(
    "form",
    [
        "artbank ssam",
        pytest.param("artbank released", marks=pytest.mark.slow),
        "lsast paper",
        pytest.param("lsast released", marks=pytest.mark.slow),
    ],
)
# For runs that are not about blocks: two of them, since each auxiliary network takes long to build.
BRIEF = [*NO_PICTURES, "--local.cut", "[mid.0]"]


def made(form: str, room: Path, *overrides: str) -> tuple[Any, Any]:
    config, own = FORMS[form]
    return task_of(config, room, *own, *overrides)


def messages(task: Any, count: int = 3) -> list[Message]:
    every = itertools.chain.from_iterable(lot for epoch in range(count) for lot in task.batches(epoch, 0))
    return [replace(message, sequence=number) for number, message in enumerate(itertools.islice(every, count))]


def reopened_base(room: Path) -> Path:
    """A folder with a text model whose token embeddings are small, as CLIP's are."""
    base = Base("tiny")
    text = base.text_encoder()
    with torch.no_grad():
        text.get_input_embeddings().weight.mul_(0.02)
    base.text_encoder = lambda: text
    base.save(room / "base", base.unet(), AutoencoderTiny())
    return room / "base"


Finished = Callable[[str], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Room and state of a form's finished run on ``reopened_base``; tests that write into the room copy it."""

    @functools.cache
    def run(form: str) -> tuple[Path, dict[str, Tensor]]:
        config, own = FORMS[form]
        room = tmp_path_factory.mktemp("finished")
        return room, fit(config, room, *small(), *own, *BRIEF, "--model.pretrained", str(reopened_base(room)))

    return run


@every_form
def test_one_block_is_the_plain_step_to_the_bit(tmp_path: Path, form: str) -> None:
    """diffusers' UNet on transformers' text model, one backward pass, AdamW on what learns."""
    config, task = made(form, tmp_path, *END_TO_END)
    _, _, schedule = blocks_of(task, config)
    unet, conditioner = copy.deepcopy(task.unet), copy.deepcopy(task.conditioner)
    learning = [parameter for parameter in conditioner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, config.optimizer.lr, weight_decay=config.optimizer.weight_decay, foreach=True
    )
    before = [parameter.clone() for parameter in learning]
    for message in messages(task, 8):
        _, (report,) = schedule.step(message)
        x, t, row, present = (message.features[name] for name in ("x", "t", "row", "present"))
        loss = F.mse_loss(unet(x, t, conditioner(row, t, present)).sample, message.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(report.loss, loss.detach())
    for (name, own), (_, other) in zip(
        conditioner.named_parameters(), task.conditioner.named_parameters(), strict=True
    ):
        assert torch.equal(own, other), name
    assert all(not torch.equal(*pair) for pair in zip(learning, before, strict=True))


@one_method
@pytest.mark.parametrize("schedule", [pytest.param("end_to_end", marks=pytest.mark.slow), "sequential"])
def test_what_is_frozen_does_not_change_by_a_bit(tmp_path: Path, form: str, schedule: str) -> None:
    config, task = made(form, tmp_path, "--local.schedule", schedule)
    _, blocks, steps = blocks_of(task, config)
    random = [prompt.matrix.clone() for prompt in list(task.conditioner.prompts.values())[2:]]
    for message in messages(task):
        steps.step(message)
    assert len(blocks) == (1 if schedule == "end_to_end" else 4)
    for network, fresh in (
        (task.unet, Base("tiny").unet()),
        (task.conditioner.text_encoder, Base("tiny").text_encoder()),
    ):
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name
    for prompt, before in zip(list(task.conditioner.prompts.values())[2:], random, strict=True):
        assert torch.equal(prompt.matrix, before)


@one_method
def test_prompts_learn_on_a_batch(tmp_path: Path, form: str) -> None:
    config, task = made(form, tmp_path, *END_TO_END, "--data.batch", "8", "--optimizer.lr", "0.01")
    _, _, schedule = blocks_of(task, config)
    (message,) = next(task.batches(0, 0))
    losses = []
    for number in range(12):
        _, (report,) = schedule.step(replace(message, sequence=number))
        losses.append(float(report.loss))
    assert min(losses[-3:]) < losses[0]


@both_methods
def test_the_prompts_gradient_is_the_sum_of_the_blocks(tmp_path: Path, form: str) -> None:
    """Each block's own backward, by hand, on a copy of the prompts; the encoder's one backward has their sum."""
    config, task = made(form, tmp_path)
    chain, blocks, schedule = blocks_of(task, config)
    (message, *_) = messages(task, 1)
    with torch.no_grad():
        prompt = chain.shared(message).features["prompt"]
    total, passing = torch.zeros_like(prompt), replace(message, features={**message.features, "prompt": prompt})
    for block in blocks:
        leaf = prompt.clone().requires_grad_()
        output, prediction = block._forward(replace(passing, features={**passing.features, "prompt": leaf}))
        task.loss(prediction, message.targets).backward()
        total += leaf.grad
        passing = output.detach()
    encoder = blocks.encoder
    chain.shared(message).features["prompt"].backward(total)
    wanted = {name: p.grad.clone() for name, p in encoder.parameters_by_name() if p.grad is not None}
    encoder.optimizer.zero_grad(set_to_none=True)
    for block in blocks:
        block.zero_grad(set_to_none=True)
    found: dict[str, Tensor] = {}
    step = encoder.train_update

    def noting() -> Tensor:
        found.update({name: p.grad.clone() for name, p in encoder.parameters_by_name() if p.grad is not None})
        return step()

    encoder.train_update = noting
    schedule.step(message)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert any(bool(gradient.any()) for gradient in wanted.values())


@pytest.mark.parametrize(("form", "alive"), [("lsast paper", 30), ("lsast released", 12)])
def test_which_prompts_of_a_space_get_a_gradient(tmp_path: Path, form: str, alive: int) -> None:
    """All of the paper's; of the released routing's 30 the last 18 are never read. Every stage is in the batch."""
    config, task = made(form, tmp_path, *END_TO_END)
    blocks_of(task, config)
    space = next(iter(task.conditioner.prompts.values()))
    assert isinstance(space, PromptSpace)
    rows: list[Tensor] = []
    plain = space.all_rows

    def noted() -> Tensor:
        rows.append(plain())
        rows[-1].retain_grad()
        return rows[-1]

    space.all_rows = noted
    t = torch.arange(50, 1000, 100)
    prompt = task.conditioner(torch.zeros(10, dtype=torch.long), t, (0,))
    F.mse_loss(task.unet(torch.randn(10, 4, 8, 8), t, prompt).sample, torch.randn(10, 4, 8, 8)).backward()
    read = rows[0].grad.abs().sum(1) > 0
    assert read.tolist() == [True] * alive + [False] * (30 - alive)


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (
            "lsast paper",
            [{2}, {0, 1}, {0}, {1, 2}],
        ),  # cut at down1.0, mid.0, up1.0: outer, middle and inner, inner, ...
        ("lsast released", [{0}, {0}, {1, 2}, {2}]),
    ],
)
def test_each_block_asks_for_its_own_layers_prompts(tmp_path: Path, form: str, wanted: list[set[int]]) -> None:
    """A block of a cut at other places still learns the prompts of its layers and no others, to the last bit."""
    config, task = made(form, tmp_path, "--local.auxiliary", "greedy")
    _, blocks, schedule = blocks_of(task, config)
    leaves: list[Tensor] = []
    encoder = blocks.encoder
    collect = encoder.collect
    encoder.collect = lambda given: (leaves.append(given["prompt"].grad), collect(given))
    schedule.step(messages(task, 1)[0])
    read = [{part for part, own in enumerate(leaf.chunk(3, dim=1)) if own.any()} for leaf in leaves]
    assert read == wanted


@one_method
def test_a_checkpoint_has_the_prompts_and_nothing_frozen(finished: Finished, form: str) -> None:
    room, state = finished(form)
    base = Base(str(room / "base"))
    names = {name for name in state if not name.startswith("auxiliary.") and ":" not in name}
    assert names
    known = tuple(f"conditioner.prompts.artist_{artist}." for artist in ("textures", "photographs"))
    assert all(name.startswith(known) for name in names)
    run = open_run(room / "run")
    for name in names:
        assert torch.equal(run.chain.model.state_dict()[name], state[name]), name
    assert torch.equal(run.task.unet.conv_in.weight, base.unet().conv_in.weight)
    assert torch.equal(
        run.task.conditioner.text_encoder.get_input_embeddings().weight,
        base.text_encoder().get_input_embeddings().weight,
    )


@both_methods
def test_a_run_goes_on_is_evaluated_and_exported(tmp_path: Path, form: str) -> None:
    """The exported bank in a plain pipeline gives the run's own pictures, bit for bit."""
    config, own = FORMS[form]
    argv = [
        "--config",
        config,
        "--output.root",
        str(tmp_path),
        "--output.name",
        "run",
        *small(),
        *own,
        "--local.cut",
        "[mid.0]",
    ]
    train.main([*argv, "--train.steps", "2"])
    train.main([*argv, "--train.resume", "auto"])
    run = tmp_path / "run"
    assert (run / "evaluation/step_3/sheet.png").is_file()
    evaluate.main(["--run", str(run), *small()])
    export.main(["--run", str(run), "--out", str(tmp_path / "bank.safetensors")])
    opened = open_run(run)
    opened.task.base.save(tmp_path / "base", Base("tiny").unet(), opened.task.vae)
    kind = ArtBankPipeline if config == ARTBANK else LSASTPipeline
    pipeline = kind.from_pretrained(tmp_path / "base", prompts=tmp_path / "bank.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    content = torch.rand(1, 3, 64, 64)
    pictures = []
    for each in (opened.task.pipeline(), pipeline):
        generator = torch.Generator().manual_seed(0)
        pictures.append(each(content, "textures", num_inference_steps=3, generator=generator, output_type="pt").images)
    assert torch.equal(*pictures)
    with pytest.raises(ValueError, match=r"^--out: \S+ must end in .safetensors, the format of prompts$"):
        export.main(["--run", str(run), "--out", str(tmp_path / "model.pth")])


@one_method
def test_a_bank_is_added_to_and_the_other_artists_stay_to_the_bit(tmp_path: Path, form: str) -> None:
    config, own = FORMS[form]
    make = artbank_prompt if config == ARTBANK else lsast_prompt
    settings = {"form": form.split()[1], "template": "*", "width": 64}
    if config == ARTBANK:
        settings["tokens"] = 2
    bank = PromptBank(form.split()[0])
    for artist in ("someone else", "textures"):
        torch.manual_seed(len(artist))
        bank.add(artist, make(**settings))
    bank.save(tmp_path / "old.safetensors")
    argv = [*small(), *own, *BRIEF, "--prompt.bank", str(tmp_path / "old.safetensors")]
    _, task = made(form, tmp_path, "--prompt.bank", str(tmp_path / "old.safetensors"))
    task.build_chain()
    for name, tensor in bank["textures"].state_dict().items():
        assert torch.equal(next(iter(task.conditioner.prompts.values())).state_dict()[name], tensor), (
            "it starts from it"
        )
    fit(config, tmp_path, *argv)
    export.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "new.safetensors")])
    old, new = (load_file(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]) == name.startswith("someone else."), name
    read = load_bank(tmp_path / "new.safetensors", make, form.split()[0])
    assert sorted(read) == ["photographs", "someone else", "textures"]
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert '"base": "tiny"' in file.metadata()["artists"]


@one_method
def test_a_run_opened_again_is_the_one_that_learnt(finished: Finished, tmp_path: Path, form: str) -> None:
    """Its figures are those of training's last evaluation, and the exported prompts have the text model's scale."""
    run = shutil.copytree(finished(form)[0] / "run", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    evaluate.main(["--run", str(run)])
    again = json.loads((run / "evaluation.json").read_text())
    for key, value in again.items():
        if "noise_mse" in key:
            assert value == (summary["value"] if key == "noise_mse" else summary[key]), key
    export.main(["--run", str(run), "--out", str(tmp_path / "bank.safetensors")])
    with safe_open(tmp_path / "bank.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["artists"])
    assert all(0.01 < each["scale"] < 0.03 for each in settings.values())


@pytest.mark.slow
def test_a_checkpoint_in_half_precision_is_trained_in_fp32(tmp_path: Path) -> None:
    base = Base("tiny")
    text, unet, vae = base.text_encoder().half(), base.unet().half(), AutoencoderTiny().half()
    base.text_encoder = lambda: text
    base.save(tmp_path / "base", unet, vae)
    fit(ARTBANK, tmp_path, *small(), *BRIEF, "--model.pretrained", str(tmp_path / "base"))
    read = Base(str(tmp_path / "base"))
    assert {part().dtype for part in (read.unet, read.text_encoder, read.vae)} == {torch.float32}


def test_artists_in_another_order_or_of_another_name_are_not_mistaken(finished: Finished) -> None:
    room, state = finished("artbank ssam")
    other = ["--data.collections", '{photographs: ["scikit-image:photographs"], textures: ["scikit-image:textures"]}']
    run = open_run(room / "run", other)
    assert run.task.artists == ["photographs", "textures"]
    for artist, prompt in run.task.bank().items():
        assert torch.equal(prompt.matrix, state[f"conditioner.prompts.artist_{artist}.matrix"])
    renamed = ["--data.collections", '{photos: ["scikit-image:photographs"], textures: ["scikit-image:textures"]}']
    with pytest.raises(ValueError, match=r"belongs to another model: 'conditioner.prompts.artist_photo"):
        open_run(room / "run", renamed)


@pytest.mark.parametrize("form", ["artbank ssam", "lsast paper"])
def test_who_is_not_in_a_batch_does_not_move(tmp_path: Path, form: str) -> None:
    """AdamW would move a prompt of gradient zero by its momentum and decay."""
    config, task = made(form, tmp_path, *END_TO_END, "--data.batch", "1")
    _, _, schedule = blocks_of(task, config)
    moved: set[int] = set()
    for message in messages(task, 8):
        before = [copy.deepcopy(prompt.state_dict()) for prompt in task.conditioner.prompts.values()]
        schedule.step(message)
        now = {
            number
            for number, (prompt, was) in enumerate(zip(task.conditioner.prompts.values(), before, strict=True))
            if any(not torch.equal(tensor, was[name]) for name, tensor in prompt.state_dict().items())
        }
        assert now == set(message.features["row"].tolist())
        moved |= now
    assert moved == {0, 1}


def test_a_run_whose_data_are_gone_still_paints(tmp_path: Path) -> None:
    (tmp_path / "works").mkdir()
    for number in range(4):
        write_image(tmp_path / f"works/{number}.png", noise(64, 72, number))
    argv = [*small(), *BRIEF, "--data.collections", f"{{someone: [{tmp_path}/works]}}"]
    fit(ARTBANK, tmp_path, *argv)
    shutil.rmtree(tmp_path / "works")
    run = open_run(tmp_path / "run")
    painter = run.task.painter(run.chain, run.predict)
    assert painter.artists == ["someone"]
    assert painter.work("someone") is None


@pytest.mark.slow
@pytest.mark.parametrize("form", ["artbank ssam", "lsast paper"])
def test_two_replicas_learn_what_one_process_learns(tmp_path: Path, form: str) -> None:
    config, own = FORMS[form]
    overrides = [*small(), *own, *BRIEF, "--data.batch", "2"]
    alone = fit(config, tmp_path / "alone", *overrides)
    found = run_ranks(2, fit, config, tmp_path / "ranks", *overrides, "--placement.replicas", "2")
    for name, tensor in alone.items():
        if "conditioner" in name and ":" not in name:
            torch.testing.assert_close(found[0].value[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_stages_on_several_ranks_are_refused(tmp_path: Path) -> None:
    found = run_ranks(2, fit, ARTBANK, tmp_path, *small(), *NO_PICTURES)
    assert [each.code for each in found] == [2, 2]
    assert any("'prompts' learns from the gradients of all blocks" in each.said for each in found)


@pytest.mark.parametrize("config", [ARTBANK, LSAST])
def test_isolated_blocks_without_a_loss_are_refused_with_the_reason(tmp_path: Path, config: str) -> None:
    with pytest.raises(ValueError, match=r"^local.auxiliary: none leaves isolated blocks without a loss, and a prompt"):
        fit(config, tmp_path, *small(), "--local.auxiliary", "none")
    task_of(config, tmp_path, "--local.auxiliary", "none", *END_TO_END)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (
            ARTBANK,
            ["--data.collections", '{"van/gogh": ["scikit-image:textures"]}'],
            r"^artist: 'van/gogh' is not a name",
        ),
        (ARTBANK, ["--prompt.template", "a painting"], r"^prompt.template: 'a painting' must have one '\*'"),
        (ARTBANK, ["--prompt.template", "* *"], r"^prompt.template: '\* \*' must have one '\*'"),
        (ARTBANK, ["--prompt.rows", "16", "--prompt.tokens", "3"], r"^prompt.rows: 16 cannot be pooled to 3 tokens"),
        (
            ARTBANK,
            ["--prompt.form", "released", "--prompt.tokens", "2"],
            r"^prompt.tokens: the released form has a single vector, not 2; set it to 1$",
        ),
        (ARTBANK, ["--prompt.template", "a " * 40 + "*"], r"^prompt.template: .* more than the 32 tokens"),
        (ARTBANK, ["--prompt.bank", "/nowhere"], r"^/nowhere: there is no such file of prompts$"),
        (LSAST, ["--controlnet", "/nowhere"], r"/nowhere"),
        (
            ARTBANK,
            ["--pictures.fid_weights", "x", "--data.collections", '{a: ["scikit-image:textures"]}'],
            r"^pictures.fid_weights: FID needs at least 2 pictures; see pictures.count$",
        ),
        (ARTBANK, ["--pictures.strength", "1.5"], r"^pictures.strength: 1.5 is not from 0 to 1$"),
        (ARTBANK, ["--pictures.contents", '["/nowhere"]'], r"^pictures.contents: there is no folder /nowhere$"),
        (ARTBANK, ["--pictures.clip", "/nowhere"], r"^pictures.clip: no CLIP model can be loaded from '/nowhere'"),
        (ARTBANK, ["--pictures.fid_weights", "/nowhere"], r"^pictures.fid_weights: there is no file /nowhere$"),
        (LSAST, ["--prompt.stages", "0"], r"^prompt.stages: 0 is too small; the least is 1$"),
        (LSAST, ["--local.precision", "fp16"], r"^local.precision: 'prompts' sums the gradients"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    tmp_path: Path, config: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(config, tmp_path, *small(), *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_bank_of_another_width_or_form_is_refused(tmp_path: Path) -> None:
    bank = PromptBank("artbank")
    bank.add("textures", artbank_prompt(form="ssam", template="*", width=32, base="another"))
    bank.save(tmp_path / "narrow.safetensors")
    argv = [*small(), "--prompt.bank", str(tmp_path / "narrow.safetensors")]
    with pytest.raises(ValueError, match=r"has width 32, learnt with 'another'; the text model .* has width 64$"):
        fit(ARTBANK, tmp_path, *argv)
    bank = PromptBank("artbank")
    bank.add("textures", artbank_prompt(form="released", template="*", width=64))
    bank.save(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"^prompt.form: that of 'textures' is 'released' in \S+, .* says 'ssam'$"):
        fit(ARTBANK, tmp_path, *argv)
    bank = PromptBank("artbank")
    bank.add("textures", artbank_prompt(form="ssam", template="*", width=64, tokens=2))
    bank.save(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"^prompt.tokens: that of 'textures' is 2 in \S+, the config says 1$"):
        fit(ARTBANK, tmp_path, *argv)
