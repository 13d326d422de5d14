import random
import xml.etree.ElementTree as xml

import pytest

from engine.distributed.timeline import action_grid, from_json, newest, steady, svg, to_json, utilisation
from engine.utilities.recorder import Entry, Recorder


def lane(rank: int, *spans: tuple[float, float], kind: str = "train", block: int | None = None) -> list[Entry]:
    """Messages 0, 1, ... of one rank."""
    block = rank if block is None else block
    return [Entry(rank, block, kind, message, start, stop) for message, (start, stop) in enumerate(spans)]


def pipeline(ranks: int, messages: int, lead: int = 1, seconds: float = 0.01) -> list[Entry]:
    """Equal ranks, each ``lead`` messages behind the one before; in no order of time."""
    begun = 1.7e9
    made = [
        Entry(rank, rank, "train", m, begun + (m + lead * rank) * seconds, begun + (m + lead * rank + 1) * seconds)
        for rank in range(ranks)
        for m in range(messages)
    ]
    random.Random(0).shuffle(made)
    return made


def test_a_recorder_keeps_the_newest_in_order() -> None:
    recorder = Recorder(rank=3, limit=4)
    for message in range(10):
        with recorder.span(5, "train", message):
            pass
    with recorder.span(-1, "save", -1):
        pass
    assert [(entry.rank, entry.block, entry.kind, entry.message) for entry in recorder.entries] == [
        (3, 5, "train", 7),
        (3, 5, "train", 8),
        (3, 5, "train", 9),
        (3, -1, "save", -1),
    ]
    times = [time for entry in recorder.entries[:3] for time in (entry.start, entry.stop)]
    assert times == sorted(times)


def test_recorded_time_never_goes_back_when_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(rank=0)
    with recorder.span(0, "train", 0):
        monkeypatch.setattr("time.time", lambda: 0.0)
    (entry,) = recorder.entries
    assert entry.stop >= entry.start > 1.6e9


def test_what_fails_is_not_recorded() -> None:
    recorder = Recorder(rank=0)
    with pytest.raises(RuntimeError, match="boom"), recorder.span(0, "train", 0):
        raise RuntimeError("boom")
    assert recorder.entries == []


def test_steady_state_is_from_the_last_first_step_to_the_first_last() -> None:
    entries = lane(0, (0, 1), (1, 2), (2, 3)) + lane(1, (1.5, 2), (2.5, 3), (3.5, 4))
    assert steady(entries) == (1.5, 3)
    # Neither evaluation nor waiting begins or ends it.
    assert steady(entries + lane(1, (0, 1), kind="wait") + lane(0, (5, 9), kind="evaluate")) == (1.5, 3)


@pytest.mark.parametrize(
    "entries", [[], lane(0, (0, 1)) + lane(1, (1, 2)), lane(0, (0, 1), kind="evaluate"), lane(0, (0, 0))]
)
def test_without_steady_state_there_is_no_utilisation(entries: list[Entry]) -> None:
    assert steady(entries) is None
    assert utilisation(entries) == {}


def test_utilisation_counts_what_lies_inside_and_no_waits() -> None:
    entries = (
        lane(0, (0, 4), (4, 8), (8, 12))  # window 2 to 12
        + lane(1, (2, 3), (6, 7), (10, 20), block=1)
        + lane(1, (3, 5), block=2)
        + lane(1, (5, 6), (7, 9.5), kind="wait", block=-1)
        + lane(1, (9.5, 10), kind="save", block=-1)
    )
    assert steady(entries) == (2, 12)
    found = utilisation(entries)
    assert found[0].busy == 1.0
    assert found[0].block_seconds == {0: 10}
    assert found[1].busy == pytest.approx((1 + 1 + 2 + 2 + 0.5) / 10)
    assert found[1].block_seconds == {1: 4, 2: 2}


def test_newest_keeps_a_short_run_whole() -> None:
    entries = pipeline(3, 12)
    assert newest(entries) == entries


@pytest.mark.parametrize("lead", [1, 5])
def test_newest_is_of_the_steady_state_and_leaves_no_false_gap(lead: int) -> None:
    shown = newest(pipeline(3, 60, lead=lead, seconds=1.0))
    # Rank 0 ends message 59 at 60; the last rank is 2 * lead behind, so it shows its 12 up to 59 - 2 * lead.
    for rank in range(3):
        messages = sorted(entry.message for entry in shown if entry.rank == rank)
        assert messages == list(range(48 - lead * rank, 60 - lead * rank))


def test_grid_shows_who_worked_on_what() -> None:
    entries = (
        lane(0, (0, 1), (2, 3), block=9)
        + lane(0, (1, 2), block=10)
        + lane(0, (3, 4), kind="save", block=-1)
        + lane(1, (0, 1.9), kind="wait", block=-1)
        + lane(1, (1.9, 2.4), (2.4, 4), block=35)
    )
    assert action_grid(entries, width=4) == "rank 0  9a9*\nrank 1  ..zz  a column is 1e+03 ms"
    assert action_grid(entries, width=8) == "rank 0  99aa99**\nrank 1  ....zzzz  a column is 500 ms"


def test_a_cell_shows_the_block_that_worked_most_or_idle_if_none_worked_half() -> None:
    entries = lane(0, (0, 0.3), block=1) + lane(0, (0.3, 0.7), block=2) + lane(0, (1, 1.4), (1.9, 2), block=3)
    assert action_grid(entries, width=2).splitlines()[0].split("  ")[1] == "23"
    entries = lane(0, (0, 0.45), block=1) + lane(0, (1, 2), block=37)
    assert action_grid(entries, width=2).splitlines()[0].split("  ")[1] == ".1"


def test_grid_and_picture_of_nothing_are_refused() -> None:
    for show in (action_grid, svg):
        with pytest.raises(ValueError, match="no timeline: 0 entries took no time; train a step first"):
            show([])
        with pytest.raises(ValueError, match="no timeline: 1 entries took no time"):
            show(lane(0, (1, 1)))


def texts(picture: str) -> list[str]:
    return [node.text or "" for node in xml.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


def test_picture_shows_ranks_blocks_and_messages() -> None:
    found = texts(svg([*pipeline(3, 60), *lane(1, (1.7e9 + 0.55, 1.7e9 + 0.56), kind="wait", block=7)]))
    assert [text for text in found if text.startswith("rank")] == ["rank 0", "rank 1", "rank 2"]
    assert [text for text in found if text.startswith("block")] == ["block 0", "block 1", "block 2"]
    assert found.count("57") == 3
    assert found.count("59") == 1
    assert "45" not in found  # older than twelve messages
    assert "ms" in found


def test_messages_are_written_where_they_fit() -> None:
    found = texts(svg(lane(0, (0, 0.001), (0.001, 1), block=3) + lane(0, (1, 1.0001), kind="save", block=-1)))
    # Of message 0 (1 ms) and the save (0.1 ms) in a picture of 1 s there is no number and no name.
    assert found[found.index("rank 0") :] == ["rank 0", "1", "no block", "block 3"]


def test_equal_entries_give_equal_text() -> None:
    first, second = svg(pipeline(2, 20)), svg(pipeline(2, 20))
    assert first == second
    assert svg(pipeline(2, 21)) != first


def test_json_gives_the_same_entries_back() -> None:
    entries = [*pipeline(2, 3), Entry(1, -1, "save", -1, 0.1, 1 / 3)]
    assert from_json(to_json(entries)) == entries
    assert from_json(to_json([])) == []


@pytest.mark.parametrize("text", ["[", "3", "{}x", '[{"rank": 0}]', "[[0, 0]]", '{"rank": 0}'])
def test_what_is_no_timeline_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)
