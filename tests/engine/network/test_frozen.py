"""Frozen weights that have a file of their own stay out of checkpoints, and of nothing else."""

import pytest
import torch
from torch import nn

from engine.learning.build import build_blocks
from engine.learning.optimizer import build_optimizer
from engine.network.chain import Chain, Unit
from engine.network.cut import cut_by_names
from engine.network.frozen import leave_out_frozen
from engine.network.message import Message
from tests.toy import Toy, blocks_of, config


def half_frozen() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    leave_out_frozen(model)
    return model


def test_the_state_has_what_learns() -> None:
    assert list(half_frozen().state_dict()) == ["2.weight", "2.bias"]


def test_the_state_can_be_loaded_and_leaves_the_rest_as_it_is() -> None:
    model, other = half_frozen(), half_frozen()
    with torch.no_grad():
        other[2].weight.fill_(5.0)
        other[0].weight.fill_(7.0)
    before = model[0].weight.clone()
    model.load_state_dict(other.state_dict())
    assert model[2].weight.eq(5).all()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("name", "error"), [("2.bias", "Missing key"), ("3.bias", "Unexpected key")])
def test_what_learns_must_be_there_and_nothing_else(name: str, error: str) -> None:
    model, state = half_frozen(), half_frozen().state_dict()
    if name in state:
        del state[name]
    else:
        state[name] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=error):
        model.load_state_dict(state)


def test_a_part_of_a_larger_model_can_be_left_out() -> None:
    outer = nn.ModuleDict({"inner": half_frozen(), "more": nn.Linear(1, 1)})
    assert list(outer.state_dict()) == ["inner.2.weight", "inner.2.bias", "more.weight", "more.bias"]


def test_a_chain_of_such_a_model_is_exact() -> None:
    model = half_frozen()
    units = [Unit("frozen", model[:2]), Unit("learns", model[2])]
    chain = Chain(model, units[:1], units[1], Message({"x": torch.zeros(2, 2)}), layout="NLC")
    assert chain.names(*(unit.module for unit in units)) == ["2.weight", "2.bias"]


def test_a_frozen_parameter_in_no_unit_is_found_though_the_state_has_it_not() -> None:
    model = half_frozen()
    with pytest.raises(ValueError, match=r"^'0.weight' of the model is in no unit$"):
        Chain(
            model, [Unit("norm", model[1])], Unit("learns", model[2]), Message({"x": torch.zeros(2, 2)}), layout="NLC"
        )


def test_an_optimizer_over_nothing_steps() -> None:
    for name in ("sgd", "adamw"):
        optimizer = build_optimizer(config(optimizer__name=name).optimizer, [("w", nn.Parameter(torch.ones(1), False))])
        optimizer.step()
        assert optimizer.param_groups[0]["params"] == []


def conditioned_chain(reads: set[int]) -> Chain:
    """Three frozen layers, of which those in ``reads`` read a code that a shared encoder makes."""
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2)} | {f"layer{n}": nn.Linear(2, 2) for n in range(3)})
    for n in range(3):
        model[f"layer{n}"].requires_grad_(False)
    model["head"] = nn.Linear(2, 1).requires_grad_(False)
    units = [Unit(f"layer{n}", model[f"layer{n}"], conditioned=n in reads) for n in range(3)]
    return Chain(
        model,
        units,
        Unit("head", model["head"]),
        Message({"x": torch.zeros(2, 2)}),
        shared=Unit("encoder", model["encoder"]),
        shared_names=("code",),
    )


def test_frozen_units_that_read_shared_conditioning_are_blocks_of_their_own() -> None:
    spans = cut_by_names(conditioned_chain({0, 1, 2}), ["layer1", "layer2"])
    assert [(span.start, span.stop) for span in spans] == [(0, 1), (1, 2), (2, 3)]


def test_frozen_units_that_do_not_are_merged() -> None:
    spans = cut_by_names(conditioned_chain({0, 2}), ["layer1", "layer2"])
    assert [(span.start, span.stop) for span in spans] == [(0, 1), (1, 3)]
    assert spans[1].frozen == ("layer1",)


def test_a_chain_without_an_encoder_has_nothing_to_condition() -> None:
    task = Toy()
    chain, _, _ = blocks_of(task, config(local__blocks=2))
    assert chain.shared is None
    assert build_blocks(chain, config(local__blocks=2), task)
