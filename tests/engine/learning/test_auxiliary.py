import threading

import pytest
import torch
from torch import nn

from engine.config import Config, LocalConfig
from engine.learning.auxiliary import AuxiliaryNetwork, build_auxiliary
from engine.learning.auxiliary.glcan import GLCAN, remaining_units
from engine.learning.auxiliary.thin import thin
from engine.learning.build import build_blocks, remarks
from engine.network.bank import FeatureBank
from engine.network.chain import Chain, Unit
from engine.network.cut import Span, cut_by_count
from engine.network.layout import as_map
from engine.network.message import Message
from tasks.classification.config import ClassificationConfig
from tasks.classification.resnet import resnet_chain
from tasks.classification.task import Classification
from tests.toy import Toy, blocks_of, config, train

NAMES = ["dgl", "glcan", "greedy"]


def classification() -> Classification:
    config = ClassificationConfig(task="classification")
    config.model.classes = 10
    return Classification(config)


def build(spec: object, blocks: int = 4, block: int = 1, depth: int = 20, size: int = 32) -> tuple:
    chain, task = resnet_chain(depth, 10, size), classification()
    spans = cut_by_count(chain, blocks)
    bank = FeatureBank({s.index: task.key_features(chain, chain.shapes()[s.stop - 1]) for s in spans[:block]})
    return chain, spans[block], build_auxiliary(spec, chain, spans[block], bank, task, seed=0)


def run(chain, span: Span, auxiliary: AuxiliaryNetwork, blocks: int = 4) -> torch.Tensor:
    message, bank, task = Message({"x": torch.randn(3, 3, 32, 32)}), FeatureBank(), classification()
    for earlier in cut_by_count(chain, blocks)[: span.index + 1]:
        for unit in earlier.units(chain):
            message = unit(message)
        if earlier.index < span.index:
            bank = bank.add(earlier.index, task.key_features(chain, message).detach())
    return auxiliary(message, bank)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_predicts_classes_and_every_parameter_gets_a_gradient(name: str, block: int) -> None:
    chain, span, auxiliary = build(name, block=block)
    prediction = run(chain, span, auxiliary)
    assert prediction.shape == (3, 10)
    prediction.square().sum().backward()
    for parameter, tensor in auxiliary.named_parameters():
        assert tensor.grad is not None, parameter
        assert tensor.grad.abs().sum() > 0, parameter


def test_glcan_takes_the_first_units_of_each_remaining_stage() -> None:
    chain = resnet_chain(32, 10, 32)

    def names(stop: int, depth: int) -> list[str]:
        return [unit.name for unit in remaining_units(chain, Span(0, 2, 0, stop), depth)]

    assert names(1, 1) == ["layer1.0", "layer2.0", "layer3.0"]
    assert names(3, 1) == ["layer2.0", "layer3.0"], "its own stage does not count"
    assert names(6, 2) == ["layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    assert names(12, 2) == ["layer3.1", "layer3.2"], "but in the last stage, what is left of it does"
    assert names(15, 2) == ["layer3.4"]
    assert names(6, 0) == []
    single = Span(3, 16, 3, 4)
    assert [unit.name for unit in remaining_units(chain, single, 2)] == ["layer2.0", "layer3.0"]


def test_glcan_has_weights_of_its_own() -> None:
    chain, _, auxiliary = build("glcan")
    assert not {id(p) for p in chain.model.parameters()} & {id(p) for p in auxiliary.parameters()}
    other = build("glcan", block=0)[2]
    copies = [dict(network.named_parameters()) for network in (auxiliary, other)]
    same = [name for name in copies[0] if name in copies[1] and torch.equal(copies[0][name], copies[1][name])]
    assert not [name for name in same if "conv" in name], "blocks do not start alike"


def test_glcan_global_part_reads_the_bank() -> None:
    chain, span, auxiliary = build("glcan", block=2)
    assert auxiliary.head.linear.in_features == 64 + 16 + 16
    assert auxiliary.uses_bank
    _, _, without = build({"type": "glcan", "use_bank": False}, block=2)
    assert without.head.linear.in_features == 64
    assert not without.uses_bank
    assert run(chain, span, without).shape == (3, 10)


def test_glcan_reduces_resolution() -> None:
    seen = []
    _, span, auxiliary = build({"type": "glcan", "reduce": 2}, block=0)
    auxiliary.local_modules[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    chain = resnet_chain(20, 10, 32)
    run(chain, span, auxiliary)
    assert seen[0] == (3, 16, 16, 16)
    tiny = build({"type": "glcan", "reduce": 4}, block=2, size=8)[2]
    assert tiny.reduce == 1, "2 x 2 maps are not reduced to nothing"


def test_glcan_width_thins_and_still_fits() -> None:
    chain, span, auxiliary = build({"type": "glcan", "width": 0.5}, block=0)
    full = build("glcan", block=0)[2]
    sizes = [sum(p.numel() for p in network.parameters()) for network in (auxiliary, full)]
    assert sizes[0] < 0.3 * sizes[1]
    assert run(chain, span, auxiliary).shape == (3, 10)
    convolutions = [m for m in auxiliary.local_modules.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions][-1] == 32


def test_thin_keeps_groups_and_refuses_what_it_does_not_know() -> None:
    grouped = thin(nn.Conv2d(64, 64, 3, padding=1, groups=8), 0.5)
    assert (grouped.in_channels, grouped.groups) == (32, 4)
    depthwise = thin(nn.Conv2d(64, 64, 3, padding=1, groups=64), 0.25)
    assert (depthwise.in_channels, depthwise.groups) == (16, 16)
    block = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GroupNorm(4, 16), nn.PReLU(), nn.Conv2d(16, 8, 1))
    assert thin(block, 2.0)(torch.randn(1, 16, 2, 2)).shape == (1, 16, 2, 2)
    with pytest.raises(ValueError, match="^Conv2d: 11 to 11 channels are not divisible by groups 0"):
        thin(nn.Conv2d(24, 24, 3, groups=2), 0.45)
    module = nn.Module()
    module.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="^MultiheadAttention 'attention': neither a convolution nor a normalisation"):
        thin(module, 0.5)


class Standardised(nn.Conv2d):
    """More than its base class, which it must stay: its weights are standardised, as those of mmcv's ConvWS2d."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("kind", [Standardised, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 4])
def test_thin_goes_by_what_a_convolution_has_not_by_its_class(kind: type[nn.Conv2d], groups: int) -> None:
    layer = thin(kind(16, 32, 3, padding=1, groups=groups), 0.5)
    assert type(layer) is kind
    assert layer(torch.randn(2, 8, 5, 5)).shape == (2, 16, 5, 5)
    assert layer.weight.std() > 0


def test_thin_keeps_a_scalar_buffer() -> None:
    layer = nn.Conv2d(16, 32, 3, padding=1)
    layer.register_buffer("scale", torch.tensor(2.0))
    assert thin(layer, 0.5).scale == 2


@pytest.mark.parametrize(
    "layer", [nn.SyncBatchNorm(16), nn.InstanceNorm2d(16), nn.BatchNorm2d(16, affine=False), nn.GroupNorm(4, 16)]
)
def test_thin_goes_by_what_a_normalisation_has_not_by_its_class(layer: nn.Module) -> None:
    kind, own = type(layer), {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    thinned = thin(layer, 0.5)
    assert type(thinned) is kind
    assert {key: tuple(value.shape) for key, value in thinned.state_dict().items()} == {
        key: (8,) if shape else () for key, shape in own.items()
    }
    assert thinned.eval()(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


class Splitting(nn.Module):
    """Thin layers in a module that still counts on its own number of channels, as Res2Net's does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.convolution = channels, nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.convolution(x).split([self.channels // 2, self.channels // 2], 1)
        return torch.cat([second, first], 1)


def test_a_unit_that_cannot_be_thinned_keeps_its_width_and_says_so() -> None:
    modules = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), Splitting(16), nn.Conv2d(16, 16, 1)]
    units = [Unit(f"unit{number}", module, stage=str(number)) for number, module in enumerate(modules)]
    model = nn.Sequential(*modules)
    chain = Chain(model, units, Unit("head", nn.Identity()), Message({"x": torch.zeros(2, 3, 8, 8)}))
    task, spec = classification(), {"type": "glcan", "width": 0.5, "reduce": 2}
    network = build_auxiliary(spec, chain, Span(0, 2, 0, 1), FeatureBank(), task, seed=0)
    assert network(Message({"x": torch.randn(2, 16, 8, 8)}), FeatureBank()).shape == (2, 10)
    assert network.narrow.weight.shape == (8, 16, 1, 1)
    halves, (between, whole), (again, last) = network.local_modules
    assert halves.weight.shape == (8, 8, 1, 1)
    assert between.weight.shape == (16, 8, 1, 1)
    assert whole.convolution.weight.shape == (16, 16, 1, 1)
    assert again.weight.shape == (8, 16, 1, 1)
    assert last.weight.shape == (8, 8, 1, 1)
    (said,) = network.remarks
    assert said.startswith("local.auxiliary: width=0.5 cannot thin unit 'unit2', which stays at full width in GLCAN's")
    blocks = build_blocks(chain, Config(task="", local=LocalConfig(blocks=4, auxiliary=spec)), task)
    assert remarks(blocks) == [said], "once, though two blocks have the unit"


def test_glcan_takes_its_own_mistakes_for_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever went wrong while it was built was said to be units that do not fit."""
    monkeypatch.setattr(GLCAN, "__init__", lambda self, *arguments: [][0])
    with pytest.raises(IndexError):
        build("glcan")


def test_a_unit_that_python_cannot_copy_is_named_with_the_way_out() -> None:
    chain = Toy().build_chain()
    chain.units[-1].module.lock = threading.Lock()
    said = r"^unit 'layer3' cannot be copied for an auxiliary network: TypeError: .*; .* local.auxiliary greedy or dgl$"
    with pytest.raises(ValueError, match=said):
        build_blocks(chain, config(local__blocks=2, local__auxiliary="glcan"), Toy())


def test_dgl_is_pool_convolutions_and_three_layers() -> None:
    _, _, auxiliary = build("dgl", block=1)
    kinds = [type(m).__name__ for m in auxiliary.modules()]
    assert kinds.count("Conv2d") == 3
    assert kinds.count("Linear") == 3
    assert [m.kernel_size for m in auxiliary.modules() if isinstance(m, nn.Conv2d)] == [(1, 1)] * 3


def test_bad_options_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'glcn' is none of .*dgl, glcan, greedy.*; did you mean 'glcan'\?"):
        build("glcn")
    with pytest.raises(ValueError, match=r"glcan has no option 'widht', did you mean 'width'"):
        build({"type": "glcan", "widht": 1})
    with pytest.raises(ValueError, match="greedy has no option 'depth'; known: none"):
        build({"type": "greedy", "depth": 1})
    with pytest.raises(ValueError, match="options width without `type`, which is one of dgl, glcan, greedy"):
        build({"width": 0.5})
    with pytest.raises(ValueError, match="width of glcan: 'wide' is not a number"):
        build({"type": "glcan", "width": "wide"})
    with pytest.raises(ValueError, match="depth of glcan: 1.5 is not a whole number"):
        build({"type": "glcan", "depth": 1.5})
    with pytest.raises(ValueError, match="is none of"):
        build({"type": ["a"]})
    with pytest.raises(ValueError, match="reduce >= 1"):
        build({"type": "glcan", "reduce": 0})


def test_layouts_become_maps() -> None:
    assert as_map(torch.zeros(2, 5, 3), "NLC").shape == (2, 3, 1, 5)
    assert as_map(torch.zeros(2, 4, 5, 3), "NHWC").shape == (2, 3, 4, 5)
    assert as_map(torch.zeros(2, 3), "NCHW").shape == (2, 3, 1, 1)


class ReadsTheBank(AuxiliaryNetwork):
    """Gives its head the bank, and says nothing of it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @classmethod
    def build(cls, chain, span, bank, task) -> "ReadsTheBank":
        return cls(task.auxiliary_head(chain, chain.shapes()[span.stop - 1], bank))

    def forward(self, message, bank) -> torch.Tensor:
        return self.head(message, bank)


def test_the_bank_of_build_arrives_in_forward_unless_a_network_turns_it_off() -> None:
    task = Toy()
    task.own_auxiliaries = {"reads": ReadsTheBank}
    _, blocks, schedule = blocks_of(task, config(local__blocks=3, local__auxiliary="reads"))
    train(schedule, [task.example()])  # the head of block 1 has room for the features of block 0
    assert [block.keeps_key_features for block in blocks] == [True, False, False]
    for name in ("dgl", "greedy"):
        _, blocks, _ = blocks_of(task, config(local__blocks=3, local__auxiliary=name))
        assert not any(block.keeps_key_features for block in blocks), name
