"""The denoiser's task: diffusers' own training step to the bit, by blocks, on ranks, with LoRA."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from engine.learning.build import build_blocks
from engine.memory.estimate import estimate_step
from engine.memory.footprint import count_bytes
from engine.memory.variant import Variant, estimate_variant
from engine.network.message import Message
from engine.network.shapes import shapes_of
from tasks import load
from tasks.run import open_run
from tasks.style_transfer.diffusion.base import Base
from tests.ranks import run_ranks
from tests.runs import course, fit, joined
from tests.tasks.style_transfer.diffusion.models import ARTBANK, DENOISER, small, task_of
from tests.toy import blocks_of
from tools import evaluate, export, train

END_TO_END = ["--local.schedule", "end_to_end"]
NO_PICTURES = ["--pictures.count", "0"]
LORA = ["--model.trains", "lora"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Folder and state of a finished run of LoRA, which tests only read."""
    room = tmp_path_factory.mktemp("lora")
    return room / "run", fit(DENOISER, room, *small(), *LORA, *NO_PICTURES)


def messages(task: Any, count: int = 3) -> list[Message]:
    every = itertools.chain.from_iterable(lot for epoch in range(count) for lot in task.batches(epoch, 0))
    return [replace(message, sequence=number) for number, message in enumerate(itertools.islice(every, count))]


@pytest.mark.parametrize("trains", [[], ["--model.time", "frozen"], LORA], ids=["full", "frozen time", "lora"])
def test_one_block_is_diffusers_own_training_step_to_the_bit(tmp_path: Path, trains: list[str]) -> None:
    config, task = task_of(DENOISER, tmp_path, *END_TO_END, *trains)
    _, blocks, schedule = blocks_of(task, config)
    plain = Base("tiny").unet()
    if trains == LORA:
        from peft import LoraConfig

        plain.requires_grad_(False)
        plain.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        with torch.no_grad():
            for (_, own), (_, other) in zip(plain.named_parameters(), task.unet.named_parameters(), strict=True):
                own.copy_(other)
    elif trains:
        plain.time_embedding.requires_grad_(False)
    learning = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, config.optimizer.lr, weight_decay=config.optimizer.weight_decay, foreach=True
    )
    for message in messages(task):
        _, (report,) = schedule.step(message)
        x, t, prompt = (message.features[name] for name in ("x", "t", "prompt"))
        loss = F.mse_loss(plain(x, t, prompt).sample, message.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(report.loss, loss.detach())
    for (name, own), (_, other) in zip(plain.named_parameters(), task.unet.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    assert len(blocks.learners) == (2 if trains == [] else 1)


def test_noise_is_diffusers_own_and_hangs_on_seed_epoch_and_step_alone(tmp_path: Path) -> None:
    _, task = task_of(DENOISER, tmp_path)
    scheduler: Any = DDIMScheduler.from_config(task.base.scheduler.config)
    first, *_ = messages(task)
    x, t, noise = first.features["x"], first.features["t"], first.targets
    alphas = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    latents = (x - (1 - alphas).sqrt() * noise) / alphas.sqrt()
    torch.testing.assert_close(scheduler.add_noise(latents, noise, t), x)
    again = task_of(DENOISER, tmp_path)[1]
    (from_third,) = next(again.batches(0, 2))
    (third,) = next(itertools.islice(task.batches(0, 0), 2, None))
    for name in ("x", "t", "prompt"):
        assert torch.equal(third.features[name], from_third.features[name])
    assert not torch.equal(third.features["x"], next(again.batches(1, 2))[0].features["x"])


def test_replicas_get_the_parts_of_the_same_batch(tmp_path: Path) -> None:
    from engine.utilities.batches import Part

    _, task = task_of(DENOISER, tmp_path, "--data.batch", "3", "--data.drop_text", "0.5")
    (whole,) = next(task.batches(0, 0))
    parts = [next(task.batches(0, 0, Part(index, 2)))[0] for index in range(2)]
    for name in ("x", "t", "prompt"):
        assert torch.equal(torch.cat([part.features[name] for part in parts]), whole.features[name])


def test_texts_are_the_collections_names_and_what_is_seen(tmp_path: Path) -> None:
    _, task = task_of(DENOISER, tmp_path)
    for _ in task.batches(0, 0):
        pass
    described = {text for text in task._encoded if text}
    assert {" ".join(text.split()[:2]) for text in described} == {"a photograph", "a texture"}
    assert any("bright" in text or "dark" in text or "pale" in text for text in described)
    _, plain = task_of(DENOISER, tmp_path, "--data.describe", "false")
    for _ in plain.batches(0, 0):
        pass
    assert {text for text in plain._encoded if text} == {"a photograph", "a texture"}
    _, dropped = task_of(DENOISER, tmp_path, "--data.drop_text", "1")
    ((message,),) = [next(dropped.batches(0, 0))]
    assert torch.equal(message.features["prompt"][0], dropped._encode([""])[0])


@pytest.mark.slow
def test_blocks_learn_and_gradients_stay_inside(tmp_path: Path) -> None:
    """A few steps on one batch lower every block's loss; the time's embedding learns from all of them."""
    config, task = task_of(DENOISER, tmp_path, "--data.batch", "8", "--optimizer.lr", "0.003")
    _, blocks, schedule = blocks_of(task, config)
    assert len(blocks) == 4
    before = task.unet.time_embedding.linear_1.weight.clone()
    (message,) = next(task.batches(0, 0))
    losses = []
    for number in range(15):
        _, reports = schedule.step(replace(message, sequence=number))
        losses.append([float(report.loss) for report in reports])
    for block in range(4):
        assert losses[-1][block] < 0.9 * losses[0][block], block
    assert not torch.equal(task.unet.time_embedding.linear_1.weight, before)


@pytest.mark.parametrize("config", [DENOISER, ARTBANK])
def test_a_chain_for_shapes_does_not_take_the_place_of_the_one_that_learns(tmp_path: Path, config: str) -> None:
    """Blocks are timed on a chain of their own when a placement is sought; pictures are made by the other."""
    settings, task = task_of(config, tmp_path)
    chain = task.build_chain()
    other = task.build_chain(initial=False)
    assert build_blocks(other, settings, task)
    assert task.model is chain.model
    assert task.unet is task.denoiser_of(chain.model)


@pytest.mark.slow
def test_blocks_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as one graph, auxiliary network included; traced and not made into C++, which takes minutes."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: plain(function, backend="eager", fullgraph=True))
    losses = []
    for compiled in ("false", "true"):
        config, task = task_of(DENOISER, tmp_path, "--local.compile", compiled)
        _, _, schedule = blocks_of(task, config)
        _, reports = schedule.step(messages(task, 1)[0])
        losses.append(torch.stack([report.loss for report in reports]))
    torch.testing.assert_close(*losses)


def test_a_block_gets_no_gradient_from_a_later_one(tmp_path: Path) -> None:
    config, task = task_of(DENOISER, tmp_path)
    _, blocks, schedule = blocks_of(task, config)
    seen = []
    blocks[0].units[0].module.conv_in.weight.register_hook(lambda gradient: seen.append(len(seen)))
    message, *_ = messages(task)
    schedule.step(message)
    assert seen == [0]
    sent, _ = blocks[0].local_step(replace(blocks.encoder(message).detach(), sequence=1))
    assert len(sent.features["skips"]) == 2
    assert not any(tensor.requires_grad for tensor in sent.tensors())


def test_lora_changes_nothing_that_is_frozen_and_saves_nothing_of_it(lora: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = lora
    model = {name for name in state if not name.startswith("auxiliary.") and ":" not in name}
    assert model
    assert all("lora_" in name for name in model)
    run = open_run(folder)
    frozen = {name: tensor for name, tensor in run.task.unet.named_parameters() if "lora_" not in name}
    fresh = Base("tiny").unet().state_dict()
    assert len(frozen) == len(fresh)
    for name, tensor in frozen.items():
        assert torch.equal(tensor, fresh[name.replace(".base_layer", "")]), name
    assert any(bool(state[name].any()) for name in model if "lora_B" in name), "LoRA's second matrices start at 0"


@pytest.mark.parametrize(
    "trains",
    [pytest.param(LORA, marks=pytest.mark.slow), ["--model.time", "frozen"]],
    ids=["lora", "frozen time"],
)
def test_two_ranks_have_the_bits_of_one_process(tmp_path: Path, trains: list[str]) -> None:
    overrides = [*small(), *trains, *NO_PICTURES]
    alone = fit(DENOISER, tmp_path / "alone", *overrides)
    found = run_ranks(2, fit, DENOISER, tmp_path / "ranks", *overrides, "--placement.stages", "[0,0,1,1]")
    parts = [each.value for each in found]
    together = joined(parts)
    assert together.keys() == dict(sorted(alone.items())).keys()
    for name, tensor in together.items():
        assert torch.equal(tensor, alone[name]), name
    assert course(tmp_path / "ranks", "noise_mse") == course(tmp_path / "alone", "noise_mse")


@pytest.mark.slow
def test_several_stages_need_a_frozen_time(tmp_path: Path) -> None:
    found = run_ranks(2, fit, DENOISER, tmp_path, *small(), *NO_PICTURES)
    assert [each.code for each in found] == [2, 2]
    assert any("'time' learns from the gradients of all blocks" in each.said for each in found)


def test_a_run_goes_on_is_evaluated_and_becomes_a_checkpoint_of_diffusers(tmp_path: Path) -> None:
    argv = ["--config", DENOISER, "--output.root", str(tmp_path), "--output.name", "run", *small()]
    train.main([*argv, "--train.steps", "2"])
    train.main([*argv, "--train.resume", "auto"])
    run = tmp_path / "run"
    assert (run / "evaluation/step_3/samples.png").is_file()
    evaluate.main(["--run", str(run), *small()])
    export.main(["--run", str(run), "--out", str(tmp_path / "folder")])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folder", subfolder="unet")
    for name, tensor in open_run(run).chain.model.state_dict().items():
        assert torch.equal(unet.state_dict()[name], tensor), name
    StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"^--out: .* is a file; a checkpoint in diffusers' layout is a folder"):
        export.main(["--run", str(run), "--out", str(tmp_path / "model.pth")])


def test_lora_is_exported_as_diffusers_reads_it(lora: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = lora
    export.main(["--run", str(folder), "--out", str(tmp_path / "lora.safetensors")])
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert all(name.startswith("unet.") for name in file.keys())  # noqa: SIM118
    made = Base("tiny")
    made.save(tmp_path / "base", made.unet(), made.vae())
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    run = open_run(folder)
    x, t, prompt = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 32, 64)
    with torch.no_grad():
        wanted = run.predict(Message({"x": x, "t": t, "prompt": prompt}))
        found = pipeline.unet(x, t, prompt).sample
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert not torch.allclose(wanted, made.unet()(x, t, prompt).sample)
    with pytest.raises(ValueError, match=r"^--out: \S+ must end in .safetensors"):
        export.main(["--run", str(folder), "--out", str(tmp_path / "lora.pth")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [[], END_TO_END, LORA],
    ids=["local", "end to end", "local lora"],
)
def test_an_estimate_is_what_a_step_takes(tmp_path: Path, overrides: list[str]) -> None:
    config, task = task_of(DENOISER, tmp_path, *overrides)
    _, blocks, _ = blocks_of(task, config)
    measured = count_bytes(blocks, config, messages(task, 1)[0])
    _, other = task_of(DENOISER, tmp_path, *overrides)
    estimate = estimate_step(
        build_blocks(other.build_chain(initial=False), config, other), config, shapes_of(other.example)
    )
    assert estimate.footprint.peak_bytes == pytest.approx(measured.peak_bytes, rel=1e-3)


@pytest.mark.slow
def test_blocks_share_of_the_activations_at_stable_diffusions_size() -> None:
    """Full training at 512 px on fake tensors: 55 % of end-to-end's at most, auxiliary networks included."""
    words = ["--config", "tasks/style_transfer/denoiser/configs/denoiser_tiny.yaml", "--data.batch", "1"]
    words += ["--model.pretrained", "sd1", "--data.size", "512", "--data.resize", "512"]
    cut = ("--local.schedule", "sequential", "--local.cut", "[down2.1, up0.2, up3.0]")
    whole, local = (estimate_variant(Variant("", given), words, load).footprint for given in ((), cut))
    assert local.highest("activations", "auxiliary") <= 0.55 * whole.highest("activations", "auxiliary")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.collections", "{}"], r"^data.collections: empty; name at least one"),
        (["--data.collections", "{a: []}"], r"^data.collections: 'a' has no folder$"),
        (["--data.collections", '{a: ["/nowhere"]}'], r"^data.collections: there is no folder /nowhere$"),
        (["--data.collections", '{a: ["scikit-image:cats"]}'], r"^data.collections: scikit-image has no 'cats' here"),
        (["--data.size", "72", "--data.resize", "80"], r"^data.size: 72; the denoiser wants a multiple of 64$"),
        (["--data.size", "128"], r"^data.resize: 64 is too small; the least is 128$"),
        (["--data.hold_out", "1"], r"^data.hold_out: 1 would keep every work"),
        (["--data.drop_text", "2"], r"^data.drop_text: 2.0 is not from 0 to 1$"),
        (["--model.pretrained", "/nowhere"], r"^model.pretrained: there is no folder /nowhere; give Stable"),
        (["--model.autoencoder", "/nowhere"], r"^model.autoencoder: no such file: /nowhere$"),
        (["--model.lora_rank", "0"], r"^model.lora_rank: 0 is too small"),
        (["--local.auxiliary", "dgl"], r"^local.auxiliary: 'dgl' is not for style_transfer/denoiser"),
        (["--local.precision", "fp16"], r"^local.precision: 'time' sums the gradients"),
        (["--train.accumulate", "3"], r"^train.accumulate: 3 does not divide data.batch, 2$"),
        (["--placement.replicas", "4"], r"^placement.replicas: 4 do not divide the 2 samples"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(DENOISER, tmp_path, *small(), *overrides)
    assert "\n" not in str(error.value)


def test_a_collection_of_one_work(tmp_path: Path) -> None:
    """It can be learnt from, but not also be kept for testing."""
    from tasks.style_transfer.images import write_image
    from tests.tasks.style_transfer.painters import noise

    write_image(tmp_path / "one.png", noise(64, 80))
    alone = ["--data.collections", f"{{one: [{tmp_path}]}}"]
    with pytest.raises(ValueError, match=r"^data.collections: 'one' has 1 work.*data.hold_out 0"):
        task_of(DENOISER, tmp_path, *alone)[1].collections  # noqa: B018
    _, task = task_of(DENOISER, tmp_path, *alone, "--data.hold_out", "0")
    assert task.works(test=True) == task.works(test=False)
