"""Predicted time: by hand where it can be counted, in order where it was measured."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.learning.offload import offloading
from engine.memory.variant import END_TO_END, RECOMPUTED, Variant, estimate_variant
from engine.memory.work import Speed, WorkCounter
from tasks import load

CONFIG = ["--config", "tasks/classification/configs/digits_resnet32_k16_glcan.yaml"]
SLOW_ARITHMETIC, SLOW_MEMORY = Speed(1.0, 1e30, 1e30), Speed(1e30, 1.0, 1e30)


def counted(speed: Speed, run) -> float:
    with FakeTensorMode(), WorkCounter(speed) as work:
        run()
    return work.seconds


def test_a_matrix_product_by_hand() -> None:
    def run() -> None:
        torch.empty(2, 3) @ torch.empty(3, 5)

    assert counted(SLOW_ARITHMETIC, run) == 2 * 2 * 3 * 5
    assert counted(SLOW_MEMORY, run) == 4 * (6 + 15 + 10)


def test_the_slower_of_arithmetic_and_traffic_counts() -> None:
    def run() -> None:
        torch.empty(2, 3) @ torch.empty(3, 5)

    assert counted(Speed(2.0, 1.0, 1.0), run) == 124
    assert counted(Speed(0.25, 1.0, 1.0), run) == 240


def test_a_convolution_backward_costs_twice_its_forward() -> None:
    convolution = nn.Conv2d(4, 8, 3, padding=1)

    def forward(backward: bool) -> float:
        with FakeTensorMode(allow_non_fake_inputs=True), WorkCounter(SLOW_ARITHMETIC) as work:
            y = convolution(torch.empty(2, 4, 6, 6, requires_grad=True))
            if backward:
                y.sum().backward()
        return work.seconds

    assert forward(False) == 2 * 2 * 8 * 4 * 9 * 36
    assert forward(True) == 3 * forward(False)


def test_views_and_allocations_are_free_and_sums_in_place_are_not() -> None:
    assert counted(SLOW_MEMORY, lambda: torch.empty(4, 4).view(16)[2:].t()) == 0
    assert counted(SLOW_MEMORY, lambda: torch.empty(16).add_(torch.empty(16))) == 3 * 64


def test_offload_pays_the_transfer_both_ways() -> None:
    def run() -> None:
        x = torch.empty(256, requires_grad=True)
        with offloading(torch.device("cpu")):
            y = x.exp()  # keeps its result
        y.backward(torch.empty(256))

    assert counted(Speed(1e30, 1e30, 1.0), run) == 2 * 1024


@pytest.mark.slow
def test_predicted_times_rank_as_measured() -> None:
    """benchmarks/results: measured ratios 1.00, 1.13 (glcan K=4), 1.38 (checkpointing), 1.45 (K=16)."""
    speed = Speed(130e9, 14e9, 7e9)
    names = [END_TO_END, Variant("", ("--local.blocks", "4")), Variant("", ("--local.blocks", "16")), RECOMPUTED]
    whole, four, sixteen, checkpointed = (estimate_variant(v, CONFIG, load, speed).step_seconds for v in names)
    assert whole < four < sixteen
    assert four < checkpointed
    assert checkpointed / whole == pytest.approx(1.33, abs=0.08)


def test_speed_is_measured() -> None:
    speed = Speed.measure(torch.device("cpu"))
    assert 1e8 < speed.flops < 1e15
    assert 1e8 < speed.bytes < 1e14
    assert 1e8 < speed.transfer < 1e14
