"""The network as a chain, its ablations, and what auxiliary networks make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.learning.build import build_blocks, remarks
from engine.network.message import Message
from tasks.style_transfer.scin.instance import InstanceNorm
from tasks.style_transfer.scin.losses import pictures_of
from tasks.style_transfer.scin.network import CHANNELS, LEVELS, LightDecoderEnd, Network, Stage, network_chain
from tasks.style_transfer.scin.task import SCINTransfer
from tests.tasks.style_transfer.scin.networks import model, scin
from tests.toy import blocks_of

KINDS: dict[str, dict[str, Any]] = {
    "scin": {},
    "adain in scin's place": {"normalisation": "adain"},
    "vgg in pe's place": {"style_encoder": "vgg"},
    "adain's network": {"transfer": "adain", "normalisation": "none", "style_encoder": "vgg"},
}
CUT = ["stage1", "stage2", "stage3"]


def message(n: int = 2, side: int = 64) -> Message:
    generator = torch.Generator().manual_seed(0)
    return Message({name: torch.rand(n, 3, side, side, generator=generator) for name in ("x", "style")})


def plain(network: Network, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """The network of the paper's figure, written down once more."""
    config, seen = network.config, network.vgg(content)
    features: dict[str, Any] = {"style": style}
    if config.style_encoder == "pe":
        features |= network.pe(style)
    else:
        from tasks.style_transfer.scin.encoder import vgg_style

        features |= vgg_style(network.vgg(style))
    if "adain" in (config.normalisation, config.transfer):
        from tasks.style_transfer.scin.instance import instance_statistics

        features["style_statistics"] = [instance_statistics(network.vgg(style)[level]) for level in LEVELS]
    x = network.transfer(seen["relu4_1"], features)
    for stage in network.stages:
        x = stage(x, features)
    return network.output(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (32, 96)])
def test_the_chain_is_the_network(kind: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = Network(model(**KINDS[kind])).eval()
    content, style = torch.rand(1, 3, *size), torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        found = network_chain(network)(Message({"x": content, "style": style}))
        assert torch.equal(found, plain(network, content, style))
    assert found.shape == content.shape


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_that_learns_and_not_vgg(kind: str) -> None:
    task = SCINTransfer(scin(model__vgg=model().vgg))
    task.config.model = model(**KINDS[kind])
    chain = task.build_chain()
    if KINDS[kind].get("normalisation") != "none":
        for module in chain.model.modules():
            if hasattr(module, "affine") and isinstance(module.affine, torch.nn.Linear):
                torch.nn.init.normal_(module.affine.weight)  # as after the first step: it starts at 0
    blocks = build_blocks(chain, scin(local__schedule="end_to_end"), task)
    features, targets = pictures_of(*(message().features[name] for name in ("x", "style")), 1)
    prediction = chain(Message(features))
    assert blocks[0].criterion is not None
    blocks[0].criterion(prediction, targets).backward()
    for name, parameter in chain.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert not [name for name, _ in chain.model.named_parameters() if "vgg" in name]
    assert ("pe" in {name.split(".")[0] for name, _ in chain.model.named_parameters()}) == (
        KINDS[kind].get("style_encoder") != "vgg"
    )


def test_untrained_pictures_are_near_grey_and_of_the_right_size() -> None:
    torch.manual_seed(0)
    found = network_chain(Network(model()).eval())(message())
    assert found.shape == (2, 3, 64, 64)
    assert found.dtype == torch.float32
    assert 0.3 < found.mean().item() < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_makes_an_image(kind: str) -> None:
    """Halved by GLCAN's reduce: local parts end at half the picture's resolution."""
    settings = scin(local__cut=CUT)
    settings.model = model(**KINDS[kind])
    width = 1.0 if settings.model.normalisation == "adain" else 0.5
    settings.local.auxiliary = {"type": "glcan", "width": width}
    task = SCINTransfer(settings)
    _, blocks, schedule = blocks_of(task, settings)
    assert len(blocks) == 4
    passing = task.example()
    for encoder in [blocks.encoder] if blocks.encoder else []:
        passing = encoder(passing)
    sizes = []
    with torch.no_grad():
        for block in blocks:
            passing, prediction = block._forward(passing)
            sizes.append(tuple(prediction.shape[2:]))
    assert sizes == [(16, 16), (16, 16), (16, 16), (32, 32)]
    _, reports = schedule.step(task.example())
    assert all(torch.isfinite(report.loss) for report in reports)
    for block in blocks.learners:
        for name, parameter in block.parameters_by_name():
            assert parameter.grad is None, name


def test_auxiliary_networks_without_a_local_part_still_have_an_image_to_show() -> None:
    """greedy on stage 0's output, at a quarter of the picture already; on a deeper cut it must be enlarged."""
    settings = scin(local__cut=["stage0", "stage2"])
    settings.local.auxiliary = "greedy"
    task = SCINTransfer(settings)
    _, blocks, schedule = blocks_of(task, settings)
    ends = [block.auxiliary.head for block in blocks[:-1]]
    assert [end.larger for end in ends] == [2, 1]
    assert all(isinstance(end, LightDecoderEnd) for end in ends)
    schedule.step(task.example())


def test_without_the_bank_no_content_features_are_added() -> None:
    settings = scin(local__cut=CUT)
    for use_bank in (True, False):
        settings.local.auxiliary = {"type": "glcan", "use_bank": use_bank}
        blocks = build_blocks(SCINTransfer(settings).build_chain(), settings, SCINTransfer(settings))
        assert [block.auxiliary.head.content is not None for block in blocks[:-1]] == [use_bank] * 3


def test_a_thinner_stage_has_the_same_resolution_and_fewer_channels() -> None:
    stage = Stage(1, model())
    thin = stage.thinned(0.5)
    features = {**message().features, "style_code": torch.zeros(2, 1536)}
    assert stage(torch.rand(2, CHANNELS[1], 4, 4), features).shape == (2, 128, 8, 8)
    assert thin(torch.rand(2, 128, 4, 4), features).shape == (2, 64, 8, 8)


def test_adain_stages_stay_at_full_width() -> None:
    settings = scin(local__cut=CUT)
    settings.model = model(normalisation="adain")
    task = SCINTransfer(settings)
    said = remarks(build_blocks(task.build_chain(), settings, task))
    assert said
    assert all("full width in GLCAN's local part: Stage: " in line and "VGG's statistics" in line for line in said)


def test_ids_of_tiles_cover_every_normalisation_of_the_content() -> None:
    """What is not the painting's is told what to normalise by."""
    network = Network(model())
    names = {name for name, module in network.named_modules() if isinstance(module, InstanceNorm)}
    assert names == {
        "pe.norm",
        "transfer.norm",
        "transfer.style_norm",
        *(f"stages.{number}.normalise.norm" for number in range(4)),
    }


def test_weights_have_no_trace_of_training() -> None:
    """What a run exports: VGG up to relu4_1, PE, attention, stages, output."""
    names = {name.split(".")[0] for name in Network(model()).state_dict()}
    assert names == {"vgg", "pe", "transfer", "stages", "output"}
