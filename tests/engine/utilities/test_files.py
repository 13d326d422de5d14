from pathlib import Path

import pytest

from engine.utilities.files import made_once, replaced


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "new/folder"

    def make(content: str, fails: bool) -> None:
        with made_once(target) as room:
            (room / "file").write_text(content)
            assert not target.exists() or fails is False
            if fails:
                raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        make("half", fails=True)
    assert list((tmp_path / "new").iterdir()) == []
    make("whole", fails=False)
    make("of a slower run", fails=False)
    assert (target / "file").read_text() == "whole"
    assert list((tmp_path / "new").iterdir()) == [target]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    with replaced(target) as partial:
        assert partial.suffix == ".pth", "writers that go by the suffix see the same one"
        partial.write_text("first")
        assert not target.exists()

    def half() -> None:
        with replaced(target) as partial:
            partial.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        half()
    assert target.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
