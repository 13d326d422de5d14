import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import UnidentifiedImageError
from safetensors.torch import save_file

from engine.run.export import export_model
from engine.utilities.files import WriteError, made_once, replaced, write_text, writing
from engine.utilities.page import write_page
from tests.disk import full_disk


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


NOISE = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
WRITERS: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda path: write_text(path, "many words " * 2000),
    "model.pth": lambda path: export_model(_model(), path),
    "model.safetensors": lambda path: export_model(_model(), path),
    "page.html": lambda path: write_page(path, {"title": "Memory"}, [], ["a line"] * 2000),
    "folder": lambda path: _folder(path),
}


def _model() -> torch.nn.Module:
    model = torch.nn.Linear(20_000, 1)
    model.weight.data[0] = NOISE
    return model


def _folder(path: Path) -> None:
    with made_once(path) as made:
        save_file({"latents": NOISE}, made / "latents.safetensors")


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / name
    with full_disk(10_000), pytest.raises(WriteError, match=f"^{target}: cannot be written: File too large$"):
        WRITERS[name](target)
    assert list((tmp_path / "new").iterdir()) == []
    WRITERS[name](target)
    assert list((tmp_path / "new").iterdir()) == [target]


def test_an_earlier_file_survives_a_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("before")
    with full_disk(), pytest.raises(WriteError, match="File too large; the earlier file is unchanged$"):
        write_text(target, "after")
    assert target.read_text() == "before"


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_place_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("a file")
    with pytest.raises(WriteError, match=f"^{tmp_path}/new/{name}: cannot be written: File exists: {tmp_path}/new$"):
        WRITERS[name](tmp_path / "new" / name)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_what_the_system_refuses_is_said_in_its_words(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refuse)
    for name, write in WRITERS.items():
        with pytest.raises(WriteError, match=f"{name}: cannot be written: {os.strerror(code)}"):
            write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_file_that_is_only_read_stays_its_own(tmp_path: Path) -> None:
    def copy() -> None:
        with replaced(tmp_path / "room/copy") as partial:
            partial.write_bytes((tmp_path / "elsewhere/nowhere").read_bytes())

    with pytest.raises(FileNotFoundError, match="elsewhere/nowhere"):
        copy()


def test_an_error_without_a_file_that_is_not_of_writing_stays_its_own(tmp_path: Path) -> None:
    """Too many open files, say, or Pillow's error of a damaged image."""
    for error in (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), UnidentifiedImageError("damaged")):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "file"):
            raise error
        assert caught.value is error
