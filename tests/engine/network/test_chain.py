import logging
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from engine.network.chain import Chain, Unit
from engine.network.message import Message
from tests.toy import Toy

EXAMPLE = Message({"x": torch.zeros(2, 4)})


def three() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_stray_parameter_is_named() -> None:
    model = three()
    with pytest.raises(ValueError, match=r"'1.weight' of the model is in no unit"):
        Chain(model, [Unit("first", model[0])], Unit("head", model[2]), EXAMPLE, "NLC")


def test_a_stray_buffer_is_named() -> None:
    model = three()
    norm = nn.Module()
    norm.weight, norm.bias = model[1].weight, model[1].bias
    with pytest.raises(ValueError, match=r"'1.running_mean' of the model is in no unit"):
        Chain(model, [Unit("first", model[0]), Unit("norm", norm)], Unit("head", model[2]), EXAMPLE, "NLC")


def test_a_parameter_in_two_units_is_named() -> None:
    model = three()
    model[2] = model[0]
    units = [Unit("first", model[0]), Unit("norm", model[1])]
    with pytest.raises(ValueError, match=r"'[02].weight' is in two units, 'first' and 'head'"):
        Chain(model, units, Unit("head", model[2]), EXAMPLE, "NLC")


def test_two_units_of_one_name_are_refused() -> None:
    model = three()
    with pytest.raises(ValueError, match="two units are called 'a'"):
        Chain(model, [Unit("a", model[0]), Unit("a", model[1])], Unit("head", model[2]), EXAMPLE, "NLC")


def test_an_argument_of_another_type_is_named() -> None:
    model = three()
    units, head = [Unit("a", model[0]), Unit("b", model[1])], Unit("head", model[2])
    wrong: dict[str, tuple[object, ...]] = {
        "head must be a Unit, got Message": (model, units, EXAMPLE, head),
        "example must be a Message, got Tensor": (model, units, head, torch.zeros(2, 4)),
        "units[1] must be a Unit, got BatchNorm1d": (model, [units[0], model[1]], head, EXAMPLE),
        "units must be a list of Unit, got Sequential": (model, model, head, EXAMPLE),
        "model must be a Module, got list": (units, units, head, EXAMPLE),
    }
    for said, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"^Chain: {re.escape(said)}$"):
            Chain(*arguments)  # type: ignore[arg-type]


def test_names_are_the_models_own_even_through_a_wrapper() -> None:
    model = three()
    units = [Unit("both", nn.Sequential(model[0], model[1], nn.ReLU()))]
    chain = Chain(model, units, Unit("head", model[2]), EXAMPLE, "NLC")
    assert chain.names(units[0].module) == [n for n in model.state_dict() if not n.startswith("2.")]


def test_shapes_cost_no_statistics_and_no_mode() -> None:
    chain = Toy(norm=True).build_chain()
    before = {name: tensor.clone() for name, tensor in chain.model.state_dict().items()}
    chain.model.layers[0].eval()
    shapes = chain.shapes()
    assert [tuple(message.x.shape) for message in shapes] == [(2, 6)] * 4
    assert all(message.x.device.type == "meta" for message in shapes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in chain.model.state_dict().items())
    assert [layer.training for layer in chain.model.layers] == [False, True, True, True]


def test_skips_travel_past_units_that_ignore_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    def open_skip(module: nn.Module, message: Message) -> Message:
        return Message({"x": module(message.x), "skip": message.x}, message.targets, message.bank, message.sequence)

    def close_skip(module: nn.Module, message: Message) -> Message:
        features = dict(message.features)
        skip = features.pop("skip")
        return Message({**features, "x": module(message.x + skip)}, message.targets, message.bank, message.sequence)

    units = [Unit("open", model[0], open_skip), Unit("middle", model[1])]
    chain = Chain(model, units, Unit("close", model[2], close_skip), EXAMPLE, "NLC")
    x = torch.randn(3, 4)
    assert torch.equal(chain(Message({"x": x})), model[2](model[1](model[0](x)) + x))
    assert set(chain.shapes()[1].features) == {"x", "skip"}


def test_a_copy_of_frozen_statistics_without_eps_trains() -> None:
    """As in NAS-FCOS's backbone; torch normalises by statistics of a batch only if eps is positive."""
    unit = Unit("u", nn.BatchNorm2d(3, eps=0).eval()).copy()
    assert unit.module(torch.randn(2, 3, 4, 4)).isfinite().all()


def test_a_copy_has_the_same_distribution_and_other_weights() -> None:
    unit = Unit("u", three())
    unit.module[1].running_mean.fill_(3.0)
    torch.manual_seed(0)
    copies = [unit.copy(), unit.copy()]
    for copy in copies:
        for mine, theirs in zip(copy.module.parameters(), unit.module.parameters(), strict=True):
            assert torch.equal(mine.flatten().sort().values, theirs.flatten().sort().values)
            assert mine.data_ptr() != theirs.data_ptr()
        assert torch.equal(copy.module[1].running_mean, torch.zeros(4))
    weights = [unit.module[0].weight, *(copy.module[0].weight for copy in copies)]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert torch.equal(unit.module[1].running_mean, torch.full((4,), 3.0)), "the original is as it was"


class Caching(nn.Linear):
    """Keeps what it computes in evaluation: in a dict, as an attribute, and in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.cache: dict[str, torch.Tensor] = OrderedDict()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.detach() * 2
            self.last = self.bias.detach() * 3
            self.seen = self.seen + 1
        return super().forward(x) + self.cache["bias"] + self.last + self.seen


def test_shapes_leave_no_fake_tensor_behind() -> None:
    """A cache kept one, and the first evaluation computed with it."""
    model = nn.Sequential(Caching(), nn.Linear(4, 2))
    chain = Chain(model, [Unit("caching", model[0])], Unit("head", model[1]), EXAMPLE)
    chain.shapes()
    assert not model[0].cache
    assert not hasattr(model[0], "last")
    x = torch.randn(3, 4)
    y = chain(Message({"x": x}))
    assert type(y) is torch.Tensor
    assert torch.isfinite(y).all()


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_a_unit_that_fails_is_named_and_nothing_else_is_printed() -> None:
    """torch logs the traceback of what fails on fake tensors."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    wrong = Unit("wrong", model[0], lambda module, message: message.with_x(module(message.x) + message.x[:, :3]))
    handler, log = Log(), logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    try:
        with pytest.raises(ValueError, match=r"^unit 'wrong', given x \(2, 4\), fails: RuntimeError: .*"):
            Chain(model, [wrong], Unit("head", model[1]), EXAMPLE).shapes()
    finally:
        log.removeHandler(handler)
    assert not handler.records
    assert not log.disabled


class Weighing(nn.Linear):
    """Its result depends on values, in each of the ways that fake tensors refuse."""

    def __init__(self, how: str) -> None:
        super().__init__(4, 4)
        self.how = how
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        noise = torch.rand(())
        with torch.no_grad():
            self.weight.mul_(0.5)
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        y = super().forward(x)
        if self.how == "item":
            return y * (noise + x.abs().max()).item()
        if self.how == "if":
            return y if y.sum() > 0 else -y
        if self.how == "index":
            return y + x[x > 0].sum()
        return y + float(x.detach().numpy().sum()) if self.how == "numpy" else y


@pytest.mark.parametrize("how", ["item", "if", "index", "numpy", "none"])
def test_a_unit_that_needs_values_is_tried_on_real_tensors(how: str) -> None:
    """It would train, and was refused. Whatever a trial runs on, it leaves parameters and buffers as they were."""
    model = nn.Sequential(Weighing(how), nn.Linear(4, 2))
    chain = Chain(model, [Unit("weighing", model[0])], Unit("head", model[1]), EXAMPLE, "NLC")
    before, random, weight = model[0].passes, torch.get_rng_state(), model[0].weight
    values = weight.detach().clone()
    (message,) = chain.shapes()
    assert message.x.is_meta
    assert message.x.shape == (2, 4)
    assert chain.prediction().shape == (2, 2)
    assert model[0].passes is before
    assert not before
    assert model[0].weight is weight
    assert torch.equal(weight, values)
    assert torch.equal(torch.get_rng_state(), random)
