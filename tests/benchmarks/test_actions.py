import re

import pytest

from benchmarks.simulation.actions import Action, check, gpipe, grid, local_pipeline, one_f_one_b, zero_bubble

MAKERS = [local_pipeline, gpipe, one_f_one_b, zero_bubble]


def orders(*lines: str) -> list[list[Action]]:
    return [[Action.parse(text) for text in line.split()] for line in lines]


def alive(order: list[Action]) -> int:
    """Most messages whose activations a rank holds at once."""
    count = most = 0
    for action in order:
        count += (action.kind == "F") - (action.kind in ("B", "W"))
        most = max(most, count)
    return most


@pytest.mark.parametrize("text", ["2F0", "0B17", "10I3", "3W12", "1U7", "0L1000"])
def test_parse_is_the_inverse_of_repr(text: str) -> None:
    assert repr(Action.parse(text)) == text
    assert Action.parse(repr(Action.parse(text))) == Action.parse(text)


@pytest.mark.parametrize("text", ["", "2F", "F0", "2X0", "2F0 ", "-1F0", "2f0", "2F0B1"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is no action; write block, one of F, B")):
        Action.parse(text)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("messages", [1, 2, 4, 9])
def test_every_order_runs_and_does_everything_once(make, ranks: int, messages: int) -> None:
    made = make(ranks, messages)
    check(made)
    kinds = {local_pipeline: "L", zero_bubble: "FIW"}.get(make, "FB")
    for rank, order in enumerate(made):
        assert len(order) == len(kinds) * messages
        assert set(order) == {Action(rank, kind, message) for kind in kinds for message in range(messages)}


def test_activations_alive() -> None:
    assert [alive(order) for order in gpipe(4, 8)] == [8, 8, 8, 8]
    assert [alive(order) for order in one_f_one_b(4, 8)] == [4, 3, 2, 1]
    # Until W the inputs of the weights' gradients stay, so no rank of ZB-H1 passes the first's.
    assert [alive(order) for order in zero_bubble(4, 8)] == [4, 4, 4, 4]


def test_grid_of_one_f_one_b_is_that_of_the_papers() -> None:
    assert grid(one_f_one_b(3, 4)) == (
        "tick  rank 0  rank 1  rank 2\n"
        "   0  0F0     .       .\n"
        "   1  0F1     1F0     .\n"
        "   2  0F2     1F1     2F0\n"
        "   3  .       .       2B0\n"
        "   4  .       1B0     2F1\n"
        "   5  0B0     1F2     2B1\n"
        "   6  0F3     1B1     2F2\n"
        "   7  0B1     1F3     2B2\n"
        "   8  .       1B2     2F3\n"
        "   9  0B2     .       2B3\n"
        "  10  .       1B3     .\n"
        "  11  0B3     .       ."
    )


def test_columns_are_as_wide_as_their_longest_action() -> None:
    lines = grid([[Action(0, "L", m) for m in range(3)], [Action(1, "L", m) for m in range(3)]]).splitlines()
    assert lines[1].index("0L0") == lines[2].index("0L1")
    wide = grid(local_pipeline(2, 10_001)).splitlines()
    assert wide[-2].index("1L9999") == wide[0].index("rank 1")


def test_orders_that_wait_for_each_other_are_shown_with_the_place() -> None:
    with pytest.raises(ValueError) as error:
        check(orders("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"))
    assert str(error.value) == (
        "0B0 on rank 0 needs 1B0, which rank 1 never reaches\n"
        "tick  rank 0  rank 1\n"
        "   0  0F0     .\n"
        "   1  .       1F0\n"
        "   2  0B0     1F1  <-- ERROR HERE: 0B0 on rank 0 needs 1B0, which rank 1 never reaches"
    )


def test_the_cause_is_named_and_not_its_victims() -> None:
    with pytest.raises(ValueError) as error:
        check(orders("0L0 0L1", "1L0 1L1", "2L1 2L0", "3L0 3L1"))
    assert str(error.value) == (
        "2L1 on rank 2 needs 2L0, which rank 2 never reaches\n"
        "tick  rank 0  rank 1  rank 2  rank 3\n"
        "   0  0L0     .       .       .\n"
        "   1  0L1     1L0     .       .\n"
        "   2  .       1L1     .       .\n"
        "   3  .       .       2L1     3L0  <-- ERROR HERE: 2L1 on rank 2 needs 2L0, which rank 2 never reaches"
    )
    with pytest.raises(ValueError, match="2B0 on rank 2 needs 2F0, which no rank has"):
        check(orders("0F0 0B0", "1F0 1B0", "2B0"))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["0F0 0F2 0F1"], "0F2 on rank 0 needs 0F1, which rank 0 never reaches"),
        (["0F1"], "0F1 on rank 0 needs 0F0, which no rank has"),
        (["0B0 0F0"], "0B0 on rank 0 needs 0F0, which rank 0 never reaches"),
        (["0F0 0W0 0I0"], "0W0 on rank 0 needs 0I0, which rank 0 never reaches"),
        (["0F0 0I0 0U0"], "0U0 on rank 0 needs 0W0, which no rank has"),
        (["0F0 0B0 0W0"], "0W0 on rank 0 has run already"),
        (["0F0 0F0"], "0F0 on rank 0 has run already"),
        (["0L0", "0L1"], "0L1 on rank 1: block 0 is on rank 0"),
        (["1L0 0L0"], "1L0 on rank 0 needs 0L0, which rank 0 never reaches"),
    ],
)
def test_what_can_never_run(lines: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"<-- ERROR HERE: {reason}")):
        check(orders(*lines))


def test_blocks_may_share_a_rank_and_backwards_may_be_of_both_forms() -> None:
    check(orders("0L0 2L0 0L1 2L1", "1L0 1L1"))
    check(orders("0F0 0F1 0B0 0I1 0W1 0U1", "1F0 1I0 1F1 1B1 1W0 1U1"))
    check([])
