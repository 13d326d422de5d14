from itertools import pairwise

import pytest
import torch

from engine.config import OptimizerConfig
from engine.learning.optimizer import build_optimizer, load_state_by_name, rate_factor, state_by_name


def test_cosine_with_warmup() -> None:
    config = OptimizerConfig(schedule="cosine", warmup_epochs=1.0)
    factors = [rate_factor(config, step, steps_per_epoch=4, epochs=3) for step in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.5)
    assert all(a >= b for a, b in pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.1


def test_steps_and_constant() -> None:
    config = OptimizerConfig(schedule="step", milestones=[1, 2], gamma=0.5)
    assert [rate_factor(config, step, 2, 3) for step in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rate_factor(OptimizerConfig(schedule="constant"), 99, 10, 10) == 1.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_goes_by_name_whatever_the_order(name: str) -> None:
    a, b = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    config = OptimizerConfig(name=name)
    optimizer = build_optimizer(config, [("a", a), ("b", b), ("frozen", frozen)])
    (a.sum() + 2 * b.sum()).backward()
    optimizer.step()
    state = state_by_name(optimizer, [("a", a), ("b", b)])
    assert {key.split(":")[0] for key in state} == {"a", "b"}
    other = build_optimizer(config, [("b", b), ("a", a)])
    load_state_by_name(other, [("b", b), ("a", a)], state)
    for key, value in state_by_name(other, [("a", a), ("b", b)]).items():
        assert torch.equal(value, state[key])
