"""Every figure here is worked out by hand."""

import random
from itertools import pairwise

import pytest

from benchmarks.simulation.actions import Action, gpipe, local_pipeline, one_f_one_b, zero_bubble
from benchmarks.simulation.simulator import Simulation, simulate

EVEN = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "L": 3.0}


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
@pytest.mark.parametrize(("ranks", "messages"), [(1, 3), (2, 1), (2, 4), (4, 8), (8, 32)])
def test_the_flush_costs_p_minus_1_of_m_plus_p_minus_1(make, ranks: int, messages: int) -> None:
    result = simulate(make(ranks, messages), [EVEN] * ranks)
    assert result.step_seconds == result.makespan == 3 * (messages + ranks - 1)
    assert result.bubble == pytest.approx((ranks - 1) / (messages + ranks - 1), abs=1e-12)
    assert result.utilisation == pytest.approx([messages / (messages + ranks - 1)] * ranks)


@pytest.mark.parametrize(("ranks", "messages"), [(2, 4), (4, 8), (4, 4), (8, 32)])
def test_zero_bubble_waits_a_third_of_one_f_one_b(ranks: int, messages: int) -> None:
    # Qi et al.: (p - 1)(F + I - W) instead of (p - 1)(F + I + W)
    split = simulate(zero_bubble(ranks, messages), [EVEN] * ranks)
    whole = simulate(one_f_one_b(ranks, messages), [EVEN] * ranks)
    assert split.step_seconds == 3 * messages + (ranks - 1)
    assert whole.step_seconds == 3 * messages + 3 * (ranks - 1)
    assert 0 < split.bubble < whole.bubble


def test_a_balanced_local_pipeline_has_no_bubble() -> None:
    result = simulate(local_pipeline(4, 20), [EVEN] * 4)
    assert (result.step_seconds, result.bubble, result.utilisation) == (3.0, 0.0, [1.0] * 4)
    assert result.makespan == 3 * (20 + 4 - 1)


@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 2, None])
def test_the_slowest_rank_sets_the_pace(slow: int, depth: int | None) -> None:
    seconds = [{"L": 5.0 if rank == slow else 2.0} for rank in range(3)]
    result = simulate(local_pipeline(3, 40), seconds, depth=depth)
    assert result.step_seconds == 5.0
    assert result.utilisation == [1.0 if rank == slow else 0.4 for rank in range(3)]
    assert result.bubble == pytest.approx(1 - (1.0 + 0.4 + 0.4) / 3)


def starts(result: Simulation, rank: int) -> list[float]:
    return [run.start for run in result.runs if run.rank == rank]


def test_back_pressure_holds_the_fast_rank_back() -> None:
    seconds = [{"L": 1.0}, {"L": 10.0}]
    assert starts(simulate(local_pipeline(2, 8), seconds), 0) == [0, 1, 2, 3, 4, 5, 6, 7]
    # Message 0 is taken at 1. Message 1 fills one end and 2 the other, so 2 is sent when 1 * 2 behind it, 0, is taken,
    # 3 when message 1 is taken at 11, 4 when 2 is at 21, ...
    assert starts(simulate(local_pipeline(2, 8), seconds, depth=1), 0) == [0, 1, 2, 3, 11, 21, 31, 41]
    assert starts(simulate(local_pipeline(2, 8), seconds, depth=2), 0) == [0, 1, 2, 3, 4, 5, 11, 21]


@pytest.mark.parametrize("make", [local_pipeline, gpipe])
def test_sending_occupies_the_sender_and_is_no_work(make) -> None:
    seconds = [{"L": 3.0, "F": 1.0, "B": 2.0}] * 2
    result = simulate(make(2, 20), seconds, send=1.0)
    if make is local_pipeline:
        assert result.step_seconds == 4.0
        assert result.utilisation == [0.75, 0.75]  # the last rank waits for the first, which sends
    else:
        # 20 forwards and sends, the last forward, 20 backwards and sends, the last backward
        assert result.step_seconds == 20 * 2 + 1 + 20 * 3 + 2


@pytest.mark.parametrize(
    ("latency", "depth", "interval"), [(4, 2, 1.0), (5, 2, 1.25), (10, 2, 2.5), (10, 5, 1.0), (9, 1, 4.5)]
)
def test_depth_hides_latency(latency: float, depth: int, interval: float) -> None:
    # 2 * depth messages are on their way at once, each for as long as the latency.
    result = simulate(local_pipeline(3, 81), [{"L": 1.0}] * 3, latency=latency, depth=depth)
    assert result.step_seconds == pytest.approx(interval)


def test_latency_delays_the_first_message_only() -> None:
    result = simulate(local_pipeline(3, 10), [EVEN] * 3, latency=7.0)
    assert starts(result, 2) == [20.0 + 3 * message for message in range(10)]
    assert result.step_seconds == 3.0


@pytest.mark.parametrize("messages", [2, 4, 10])
def test_latency_stalls_one_f_one_b_again_and_again(messages: int) -> None:
    # Two ranks, d seconds: message 0 waits d on its way, every second message 2d for a backward to come and its
    # forward to go, and the last backward waits d on its way.
    plain = simulate(one_f_one_b(2, messages), [EVEN] * 2)
    late = simulate(one_f_one_b(2, messages), [EVEN] * 2, latency=0.5)
    assert late.step_seconds == plain.step_seconds + 0.5 + 2 * 0.5 * (messages / 2 - 1) + 0.5


def test_a_step_ends_when_the_last_rank_is_updated() -> None:
    orders = one_f_one_b(2, 4)
    result = simulate(orders, [EVEN] * 2, update=[1.0, 0.5])
    assert result.step_seconds == 15 + 1.0
    assert result.runs[-1].action == Action(0, "U", 3)
    assert result.utilisation == [13 / 16, 12.5 / 16]
    # The second rank is ready 2 s before the first, so up to that its update costs nothing.
    assert simulate(orders, [EVEN] * 2, update=[1.0, 3.0]).step_seconds == 16
    assert simulate(orders, [EVEN] * 2, update=[1.0, 3.25]).step_seconds == 16.25


def test_neighbours_on_one_rank_send_nothing() -> None:
    orders = [[Action(block, "L", m) for m in range(6) for block in (0, 1)], [Action(2, "L", m) for m in range(6)]]
    result = simulate(orders, [{"L": 1.0}, {"L": 2.0}], latency=3.0, depth=2)
    assert starts(result, 0) == list(range(12))
    assert starts(result, 1) == [5.0 + 2 * message for message in range(6)]
    assert (result.step_seconds, result.bubble) == (2.0, 0.0)


@pytest.mark.parametrize("make", [local_pipeline, gpipe, one_f_one_b, zero_bubble])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_do_one_thing_at_a_time_and_all_work_once_in_order(make, seed: int) -> None:
    chance = random.Random(seed)
    ranks, messages = chance.randint(1, 5), chance.randint(4, 12)
    seconds = [{kind: chance.uniform(0.1, 3) for kind in EVEN} for _ in range(ranks)]
    latency, send = chance.uniform(0, 2), chance.uniform(0, 1)
    orders = make(ranks, messages)
    result = simulate(orders, seconds, latency=latency, send=send, depth=chance.choice([None, 1, 3]))
    when = {part: run for run in result.runs for part in run.action.parts()}
    for rank, order in enumerate(orders):
        runs = [run for run in result.runs if run.rank == rank]
        assert [run.action for run in runs] == list(order)
        assert all(before.stop <= after.start for before, after in pairwise(runs))
        assert all(run.stop == run.start + seconds[rank][run.action.kind] for run in runs)
    for run in result.runs:
        for need in run.action.needs(ranks - 1):
            hop = latency + send if when[need].rank != run.rank else 0.0
            assert when[need].stop + hop <= run.start + 1e-12
    assert 0 <= result.bubble < 1
    assert max(result.utilisation) <= 1 + 1e-9


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="ERROR HERE"):
        simulate([[Action(0, "F", 1)]], [EVEN])
    with pytest.raises(ValueError, match="rank 1 has no seconds for I, W"):
        simulate(zero_bubble(2, 2), [EVEN, {"F": 1.0}])
    with pytest.raises(ValueError, match="every rank needs at least one action"):
        simulate([], [])
    with pytest.raises(ValueError, match="take no seconds of update"):
        simulate(local_pipeline(2, 4), [EVEN] * 2, update=[1.0, 1.0])
    with pytest.raises(ValueError, match="3 messages have no steady state; simulate 4 or more"):
        _ = simulate(local_pipeline(2, 3), [EVEN] * 2).step_seconds


def test_links_too_short_for_an_order_are_named() -> None:
    # Rank 0 takes nothing of block 2 before all of block 0 is sent. With depth 1 the links hold two messages each, and
    # rank 1 one: the sixth is never sent.
    orders = [
        [Action(0, "L", m) for m in range(6)] + [Action(2, "L", m) for m in range(6)],
        [Action(1, "L", m) for m in range(6)],
    ]
    assert simulate(orders, [EVEN] * 2, depth=2).makespan == 36
    with pytest.raises(ValueError, match="2L0 never runs: links are full; give a depth above 1"):
        simulate(orders, [EVEN] * 2, depth=1)
