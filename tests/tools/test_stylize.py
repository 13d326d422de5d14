"""tools/stylize.py with a run whose network is made by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tasks.style_transfer.images import as_pixels, as_tensor, read_image, resized, write_image
from tasks.style_transfer.sheet import GAP, SIDE
from tasks.style_transfer.stylize import paint_whole, stylize
from tests.tasks.style_transfer.painters import Copying, Normalising, OfArtists, noise, slope
from tools.stylize import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Contents of 40 x 30 and 20 x 50 px, styles of 40 x 60 and 40 x 40, and a file that is no folder."""
    (tmp_path / "a_file").touch()
    for folder in ("content/deep", "style"):
        (tmp_path / folder).mkdir(parents=True)
    write_image(tmp_path / "content/hill.png", slope(30, 40))
    write_image(tmp_path / "content/deep/tower.png", slope(50, 20))
    write_image(tmp_path / "style/noise.png", noise(60, 40))
    write_image(tmp_path / "style/square.png", noise(40, 40, seed=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def use(painter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_fake(folder: Path) -> SimpleNamespace:
        task = SimpleNamespace(name="toy", painter=lambda chain, predict: painter)
        return SimpleNamespace(folder=folder, task=task, chain=None, predict=None, device=torch.device("cpu"), step=7)

    monkeypatch.setattr("tasks.style_transfer.repaint.open_run", open_fake)


def words(*more: str, content: str = "content", style: str = "style") -> list[str]:
    return ["--content", content, "--style", style, "--run", "runs/r", "--out", "out/new", *more]


def test_every_content_in_every_style(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(Normalising(), monkeypatch)
    main(words("--alpha", "0.75", "--tile", "32", "--keep-colour"))
    pairs = [(content, style) for content in ("deep/tower", "hill") for style in ("noise", "square")]
    names = [f"{content.split('/')[-1]}_{style}.png" for content, style in pairs]
    assert sorted(path.name for path in Path("out/new").iterdir()) == sorted([*names, "sheet.png", "report.json"])
    for (content, style), name in zip(pairs, names, strict=True):
        painting = resized(as_tensor(read_image(Path(f"style/{style}.png"))), Normalising.style_size)[None]
        photograph = read_image(Path(f"content/{content}.png"))
        wanted = stylize(Normalising(), photograph, painting, alpha=0.75, keep_colour=True, tile=32)
        assert (read_image(Path("out/new") / name) == wanted).all()

    report = json.loads(Path("out/new/report.json").read_text())
    pictures = report.pop("pictures")
    assert report == {
        "run": "runs/r",
        "step": 7,
        "alpha": 0.75,
        "keep_colour": True,
        "tile": 32,
        "device": "cpu",
    }
    assert [picture["file"] for picture in pictures] == names
    assert all(picture.pop("seconds") > 0 for picture in pictures)
    assert pictures[0] == {
        "content": "content/deep/tower.png",
        "style": "style/noise.png",
        "file": "tower_noise.png",
        "width": 20,
        "height": 50,
    }
    assert read_image(Path("out/new/sheet.png")).shape == (3 * SIDE + 2 * GAP, 3 * SIDE + 2 * GAP, 3)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("4 pictures in out/new, 0.")
    assert last.endswith(" s each")


def test_single_files_and_sizes(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    class Noting(Copying):
        def paint(self, content: Any, style: Any, alpha: float, statistics: Any = None) -> Any:
            seen.append((tuple(content.shape[2:]), tuple(style.shape), alpha, statistics))
            return content

    use(Noting(1), monkeypatch)
    files = {"content": "content/hill.png", "style": "style/noise.png"}
    main(words("--style-size", "20", "--content-size", "60", **files))
    assert seen == [((60, 80), (1, 3, 30, 20), 1.0, None)]
    found = read_image(Path("out/new/hill_noise.png"))
    assert found.shape == (60, 80, 3)
    assert capsys.readouterr().out.startswith("1 picture in ")
    seen.clear()
    main(words(**files))
    assert seen == [((30, 40), (1, 3, 36, 24), 1.0, None)], "contents as they are, styles as the painter wants them"


def test_the_sheet_shows_the_first_in_their_places(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, values in (("dark", range(0, 90, 30)), ("bright", range(100, 220, 30))):
        Path(folder).mkdir()
        for value in values:
            write_image(Path(folder, f"{folder}{value:03}.png"), np.full((20, 20, 3), value, np.uint8))
    use(Copying(), monkeypatch)
    monkeypatch.setattr("tasks.style_transfer.repaint.ON_SHEET", 2)
    main(words(content="dark", style="bright"))
    sheet = read_image(Path("out/new/sheet.png"))
    middles = sheet[SIDE // 2 :: SIDE + GAP, SIDE // 2 :: SIDE + GAP, 0]
    assert middles.tolist() == [[255, 100, 130], [0, 0, 0], [30, 30, 30]]
    assert len(json.loads(Path("out/new/report.json").read_text())["pictures"]) == 12


def test_images_are_read_as_seldom_as_may_be(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def read(path: Path) -> Any:
        seen.append(path.stem)
        return read_image(path)

    monkeypatch.setattr("tasks.style_transfer.repaint.read_image", read)
    use(Copying(), monkeypatch)
    main(words())
    assert sorted(seen) == ["hill", "noise", "square", "tower"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alpha", "1.01"], r"--alpha: 1.01 is not from 0 to 1"),
        (["--alpha", "nan"], r"--alpha: nan is not from 0 to 1"),
        (["--tile", "8"], r"--tile: 8 is too small; the least is 16"),
        (["--style-size", "0"], r"--style-size: 0 is too small; the least is 1"),
        (["--content-size", "-3"], r"--content-size: -3 is too small"),
        (["--content", "contend"], r"--content: there is no file or folder contend, did you mean 'content'\?$"),
        (
            ["--style", "style/nois.png"],
            r"--style: there is no file or folder style/nois.png, did you mean 'noise.png'\?; runs/r paints in "
            "the style of a painting: give one, or a folder of them$",
        ),
        (["--style", "vangogh"], r"--style: there is no file or folder vangogh; runs/r paints in the style of a paint"),
        (["--style", "empty"], r"--style: no image in empty and its subfolders"),
        (["--style", "style/bad.txt"], r"style/bad.txt: cannot be read: not an image, or damaged"),
        (["--power", "1"], r"unrecognized arguments: --power 1; --help lists what there is"),
        (["--style-size", "100000"], r"--style-size: style/noise.png: 40 x 60 px would become 100000 x 150000"),
        (["--content-size", "90000"], r"--content-size: content/deep/tower.png: 20 x 50 px would become"),
        (["--out", "a_file"], r"a_file: cannot be written: File exists"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_painted(
    room: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    Path("empty").mkdir()
    Path("style/bad.txt").write_text("no image")
    painter = Normalising()
    use(painter, monkeypatch)
    with pytest.raises(ValueError, match=said):
        main(words(*more))
    assert not painter.seen
    assert not Path("out").exists()


def test_a_damaged_image_at_the_end_is_found_at_the_start(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("content/zebra.png").write_bytes(b"no image")
    painter = Normalising()
    use(painter, monkeypatch)
    with pytest.raises(ValueError, match=r"content/zebra.png: cannot be read"):
        main(words())
    assert not painter.seen


def test_names_that_would_meet_are_refused(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Normalising(), monkeypatch)
    write_image(Path("content/hill.jpg"), slope(20, 20))
    with pytest.raises(
        ValueError, match=r"--content: content/hill.jpg and content/hill.png have the same name; rename"
    ):
        main(words())
    Path("content/hill.jpg").unlink()
    for name in ("content/hill_old.png", "style/old_noise.png"):
        write_image(Path(name), slope(20, 20))
    said = r"content/hill.png in the style of style/old_noise.png, and content/hill_old.png in that of style/noise.png"
    with pytest.raises(ValueError, match=rf"{said}, would both be hill_old_noise.png; rename one of them"):
        main(words())


def test_no_input_is_overwritten(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Normalising(), monkeypatch)
    sheet = room / "content/sheet.png"
    write_image(sheet, slope(20, 20))
    before = sheet.read_bytes()
    with pytest.raises(ValueError, match=r"--out: .*sheet.png is read and would be written; choose another folder"):
        main(words("--out", str(room / "content"), content="content/sheet.png"))
    assert sheet.read_bytes() == before


def test_a_run_of_another_task_cannot_stylize(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(name="classification", painter=lambda chain, predict: None)
    run = SimpleNamespace(task=task, chain=None, predict=None)
    monkeypatch.setattr("tasks.style_transfer.repaint.open_run", lambda folder: run)
    with pytest.raises(ValueError, match=r"--run: runs/r is a run of classification, which cannot stylize"):
        main(words())


def test_too_large_a_tile_for_the_gpu_is_said(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Copying):
        def paint(self, *_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    use(Hungry(), monkeypatch)
    with pytest.raises(ValueError, match=r"--tile: 1024 is too much for the memory of cpu; take less"):
        main(words())


def test_as_a_user_types_it(room: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/stylize.py"), *words()]
    done = subprocess.run(command, cwd=room, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --run: runs/r is no run: it has no config.yaml\n"


def test_a_painter_says_how_strong_its_style_is(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Normalising()
    painter.alpha = 0.25
    use(painter, monkeypatch)
    main(words())
    assert json.loads(Path("out/new/report.json").read_text())["alpha"] == 0.25


def test_a_seed_is_refused_where_there_is_no_chance(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Normalising()
    use(painter, monkeypatch)
    with pytest.raises(ValueError, match=r"^--seed: 0 has no effect: runs/r paints without randomness; leave it out$"):
        main(words("--seed", "0"))
    assert not painter.seen


def test_every_content_by_every_artist(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    painter = OfArtists(["monet", "van gogh", "cezanne"])
    use(painter, monkeypatch)
    main(words("--seed", "4", "--keep-colour", "--content-size", "40", style="van gogh, monet,monet"))
    contents, artists = ("deep/tower", "hill"), ("van gogh", "monet")
    pairs = [(content, artist) for content in contents for artist in artists]
    names = [f"{content.split('/')[-1]}_{artist}.png" for content, artist in pairs]
    assert sorted(path.name for path in Path("out/new").iterdir()) == sorted([*names, "sheet.png", "report.json"])
    for (content, artist), name in zip(pairs, names, strict=True):
        photograph = as_pixels(resized(as_tensor(read_image(Path(f"content/{content}.png"))), 40))
        settings = {"alpha": 0.6, "seed": 4, "keep_colour": True, "device": torch.device("cpu")}
        wanted = paint_whole(painter, photograph, artist, name=Path(content).name, **settings)
        assert (read_image(Path("out/new") / name) == wanted).all()
    report = json.loads(Path("out/new/report.json").read_text())
    pictures = report.pop("pictures")
    assert report == {
        "run": "runs/r",
        "step": 7,
        "alpha": 0.6,
        "keep_colour": True,
        "strength": 0.6,
        "seed": 4,
        "device": "cpu",
    }
    assert [picture["file"] for picture in pictures] == names
    assert pictures[3].pop("seconds") > 0
    assert pictures[3] == {
        "content": "content/hill.png",
        "artist": "monet",
        "file": "hill_monet.png",
        "width": 53,
        "height": 40,
    }
    assert capsys.readouterr().out.splitlines()[-1].startswith("4 pictures in out/new, ")


def test_what_an_artists_painter_is_asked_for(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = OfArtists(["monet"])
    use(painter, monkeypatch)
    main(words(content="content/deep", style="monet"))
    main(words("--strength", "1", "--seed", "9", content="content/deep", style="monet"))
    assert painter.asked == [
        ((56, 24), "monet", "tower", 0.6, 0),
        ((56, 24), "monet", "tower", 1.0, 9),
    ], "filled up to multiples of 8, painted whole"


def test_an_artist_is_shown_by_a_work_or_by_nothing_which_is_said(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(OfArtists(["cezanne", "monet"], works={"monet": np.full((9, 9, 3), 77, np.uint8)}), monkeypatch)
    main(words(content="content/hill.png", style="cezanne,monet"))
    said = " ".join(capsys.readouterr().out.split())
    assert "sheet.png shows no work by cezanne: the run's collections have none here" in said
    sheet = read_image(Path("out/new/sheet.png"))
    assert sheet[SIDE // 2, SIDE // 2 :: SIDE + GAP, 0].tolist() == [255, 255, 77]
    assert sheet.shape == (2 * SIDE + GAP, 3 * SIDE + 2 * GAP, 3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--style", "monte"],
            r"^--style: 'monte' is not an artist that runs/r knows, did you mean 'monet'\?; they are: cezanne, monet$",
        ),
        (["--style", "monet,"], r"^--style: '' is not an artist that runs/r knows"),
        (["--style", "style"], r"^--style: 'style' is not an artist that runs/r knows"),
        (["--tile", "512"], r"^--tile: 512 has no effect: runs/r paints whole pictures, by artist; leave it out$"),
        (["--style-size", "64"], r"^--style-size: 64 has no effect"),
        (["--alpha", "2"], r"^--alpha: 2.0 is not from 0 to 1"),
    ],
)
def test_what_artists_cannot_is_said_before_anything_is_painted(
    room: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    painter = OfArtists(["monet", "cezanne"])
    use(painter, monkeypatch)
    with pytest.raises(ValueError, match=said):
        main([*words(style="monet"), *more])
    assert not painter.asked
    assert not Path("out").exists()


def test_too_large_a_picture_for_the_gpu_is_said(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(OfArtists):
        def paint(self, *_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    use(Hungry(["monet"]), monkeypatch)
    said = r"^--content-size: 20 x 50 px are too much for the memory of cpu; take less than 20$"
    with pytest.raises(ValueError, match=said):
        main(words(style="monet"))


@pytest.mark.parametrize("out", ["content", "style/new"])
def test_pictures_are_not_written_among_what_is_painted(room: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    use(Copying(), monkeypatch)
    with pytest.raises(ValueError, match=r"^--out: .* is in --(content|style), whose images would then be repainted"):
        main([*words()[:-1], out])
    assert not list(Path().glob("**/sheet.png"))


def test_what_cannot_be_written_is_said_before_anything_is_painted(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Normalising()
    use(painter, monkeypatch)
    Path("out/new/hill_noise.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^out/new/hill_noise.png: cannot be written: it is a folder$"):
        main(words())
    Path("out/new/hill_noise.png").rmdir()
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may write anywhere
    with pytest.raises(ValueError, match=r"^out/new/\S+.png: cannot be written: not permitted$"):
        main(words())
    assert not painter.seen


def test_pictures_that_are_there_are_replaced(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Copying(), monkeypatch)
    main(words())
    before = {path: path.read_bytes() for path in Path("out/new").glob("*.png")}
    for path in before:
        path.write_bytes(b"old")
    main(words())
    assert {path: path.read_bytes() for path in Path("out/new").glob("*.png")} == before
