"""Banks: artists come and go, and files are whole or refused in one line."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.utilities.files import WriteError
from tasks.style_transfer.artbank.prompts import new_prompt as artbank_prompt
from tasks.style_transfer.diffusion.bank import Prompt, PromptBank, check_artist, load_bank
from tasks.style_transfer.lsast.prompts import new_prompt as lsast_prompt
from tests.tasks.style_transfer import pipelines as p

MAKE = {"artbank": artbank_prompt, "lsast": lsast_prompt}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ssam": ("artbank", {"form": "ssam", "rows": 6, "tokens": 3}),
    "released vector": ("artbank", {"form": "released"}),
    "paper": ("lsast", {"form": "paper", "stages": 4}),
    "released routing": ("lsast", {"form": "released", "stages": 4}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def prompt(method: str = "artbank", seed: int = 0, **settings: Any) -> Prompt:
    return p.prompt(method, seed, **{"width": 8, "base": "somewhere/a model", "scale": 0.7, **settings})


def bank_of(*artists: str, method: str = "artbank", **settings: Any) -> PromptBank:
    """Of artists that are all different."""
    made = PromptBank(method)
    for number, artist in enumerate(artists):
        made.add(artist, prompt(method, number, **settings))
    return made


def assert_same(one: Prompt, other: Prompt) -> None:
    assert one.settings == other.settings
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert torch.equal(one(), other())


# A bank in memory.


def test_artists_are_added_replaced_and_removed() -> None:
    bank, monet, other = bank_of("van gogh"), prompt(seed=1), prompt(seed=2, form="released")
    gogh = bank["van gogh"]
    bank.add("monet", monet)
    assert (list(bank), len(bank)) == (["van gogh", "monet"], 2)
    assert bank["monet"] is monet
    bank.add("monet", other)
    assert (list(bank), len(bank)) == (["van gogh", "monet"], 2)
    assert bank["monet"] is other
    assert bank.remove("monet") is other
    assert list(bank) == ["van gogh"]
    assert "monet" not in bank
    assert 3 not in bank
    assert bank["van gogh"] is gogh


@pytest.mark.parametrize(
    ("artists", "asked", "said"),
    [
        (["monet", "cezanne"], "monte", "artist: 'monte' is none of cezanne, monet; did you mean 'monet'?"),
        (["monet", "cezanne"], "Monet", "artist: 'Monet' is none of cezanne, monet; did you mean 'monet'?"),
        (["monet", "cezanne"], "turner", "artist: 'turner' is none of cezanne, monet"),
        ([], "monet", "artist: 'monet' is unknown; there are none yet"),
    ],
)
def test_an_unknown_artist_is_told_who_is_known(artists: list[str], asked: str, said: str) -> None:
    bank = bank_of(*artists)
    for use in (bank.__getitem__, bank.remove):
        with pytest.raises(ValueError) as error:
            use(asked)
        assert str(error.value) == said
    assert list(bank) == artists


@pytest.mark.parametrize("name", ["monet", "Vincent van Gogh", "a_b-c", "9", "textures"])
def test_names_that_files_and_texts_can_hold(name: str) -> None:
    check_artist(name)
    assert name in bank_of(name)


@pytest.mark.parametrize(
    "name", ["", " monet", "-", "_a", "a.b", "a/b", "..", "a\nb", "monet\n", "*", "{artist}", "Édouard"]
)
def test_names_that_they_cannot(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^artist: '.*' is not a name; letters, digits, spaces, '_' and '-' make one$"
    ):
        bank_of(name)


def test_prompts_of_another_method_or_width_are_refused() -> None:
    bank = bank_of("monet", "cezanne")
    with pytest.raises(ValueError, match=r"^artist: 'turner' is a prompt of lsast, this bank is of artbank$"):
        bank.add("turner", prompt("lsast"))
    with pytest.raises(ValueError, match=r"^artist: 'turner' has width 16, the others of this bank have 8$"):
        bank.add("turner", prompt(width=16))
    assert list(bank) == ["monet", "cezanne"]


# Files.


@every_form
def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path, form: str) -> None:
    method, settings = FORMS[form]
    bank = bank_of("van gogh", "monet", method=method, **settings)
    with torch.no_grad():
        for parameter in bank["monet"].parameters():
            parameter.mul_(1 / 3)
    bank.save(tmp_path / "new/folder/bank.safetensors")
    again = load_bank(tmp_path / "new/folder/bank.safetensors", MAKE[method], method)
    assert (again.method, list(again)) == (method, ["van gogh", "monet"])
    for artist in bank:
        assert_same(bank[artist], again[artist])
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["bank.safetensors"]
    again.save(tmp_path / "again.safetensors")
    for name, tensor in load_file(tmp_path / "new/folder/bank.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "again.safetensors")[name]), name


@every_form
def test_loaded_prompts_go_on_learning(tmp_path: Path, form: str) -> None:
    method, settings = FORMS[form]
    bank = bank_of("monet", method=method, **settings)
    bank["monet"].requires_grad_(False)
    bank.save(tmp_path / "bank.safetensors")
    again = load_bank(tmp_path / "bank.safetensors", MAKE[method], method)["monet"]
    assert again.training
    again().square().sum().backward()
    assert again.matrix.grad.abs().sum() > 0


def test_the_file_can_be_read_without_this_project(tmp_path: Path) -> None:
    bank = bank_of("van gogh", "monet")
    bank.save(tmp_path / "bank.safetensors")
    with safe_open(tmp_path / "bank.safetensors", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata.keys() == {"method", "artists"}
    assert metadata["method"] == "artbank"
    settings = json.loads(metadata["artists"])
    assert list(settings) == ["van gogh", "monet"]
    wanted = {"method": "artbank", "form": "ssam", "template": "a painting by {artist} *", "width": 8, "tokens": 1}
    assert settings["monet"] == {**wanted, "rows": 16, "scale": 0.7, "base": "somewhere/a model"}
    parts = ("matrix", "ssam.query.weight", "ssam.key.weight", "ssam.value.weight")
    assert names == {f"{artist}.{part}" for artist in bank for part in parts}
    assert torch.equal(load_file(tmp_path / "bank.safetensors")["monet.matrix"], bank["monet"].matrix)


def test_names_of_which_one_begins_another(tmp_path: Path) -> None:
    bank = bank_of("mo", "monet", "mo net")
    bank.save(tmp_path / "bank.safetensors")
    again = load_bank(tmp_path / "bank.safetensors", artbank_prompt, "artbank")
    for artist in bank:
        assert_same(bank[artist], again[artist])


def test_forms_and_settings_may_differ_within_a_bank(tmp_path: Path) -> None:
    bank = bank_of("monet")
    bank.add("turner", prompt(seed=3, form="released", template="* by {artist}"))
    bank.save(tmp_path / "bank.safetensors")
    again = load_bank(tmp_path / "bank.safetensors", artbank_prompt, "artbank", 8)
    for artist in bank:
        assert_same(bank[artist], again[artist])


@pytest.mark.parametrize("part", ["tasks.style_transfer.diffusion.bank.save_file", "engine.utilities.files.flush"])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    path = tmp_path / "bank.safetensors"
    bank_of("monet").save(path)
    before = path.read_bytes()

    def fail(*given: Any) -> None:
        room = next(each for each in given if isinstance(each, Path))
        room.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no room left")

    monkeypatch.setattr(part, fail)
    with pytest.raises(WriteError, match="cannot be written: no room left"):
        bank_of("monet", "cezanne").save(path)
    assert path.read_bytes() == before
    with pytest.raises(WriteError, match="cannot be written: no room left"):
        bank_of("monet").save(tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    monkeypatch.undo()
    bank_of("monet", "cezanne").save(path)
    assert [each.name for each in tmp_path.glob("*bank*")] == ["bank.safetensors"], "and the next one is written"
    assert list(load_bank(path, artbank_prompt, "artbank")) == ["monet", "cezanne"]


def rewrite(path: Path, **metadata: str | None) -> None:
    """The same tensors with other metadata; None leaves a key out."""
    with safe_open(path, "pt") as file:
        merged = {**file.metadata(), **metadata}
    save_file(load_file(path), path, {key: value for key, value in merged.items() if value is not None})


def change(path: Path, artist: str = "monet", **settings: Any) -> None:
    """Other settings of an artist; None leaves one out."""
    with safe_open(path, "pt") as file:
        artists = json.loads(file.metadata()["artists"])
    merged = {**artists[artist], **settings}
    artists[artist] = {key: value for key, value in merged.items() if value is not None}
    rewrite(path, artists=json.dumps(artists))


def without(path: Path, name: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "there is no such file of prompts$"),
        (lambda path: cut(path, 0), "cannot be read: "),
        (lambda path: cut(path, 100), "cannot be read: "),
        (lambda path: cut(path, -1), "cannot be read: "),
        (lambda path: path.write_bytes(b"\x89PNG and\nmore lines\n" * 100), "cannot be read: "),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "holds no prompts: a bank's metadata have `method` and"),
        (lambda path: rewrite(path, method=None), "holds no prompts: "),
        (lambda path: rewrite(path, artists=None), "holds no prompts: "),
        (lambda path: rewrite(path, artists="[]"), "holds no prompts: "),
        (lambda path: rewrite(path, artists="{"), "cannot be read: "),
        (lambda path: rewrite(path, artists='{"monet": 3}'), "holds no prompts: "),
        (lambda path: rewrite(path, method="lsast"), "has prompts of lsast, not of artbank$"),
        (lambda path: without(path, "monet.matrix"), "the prompt of 'monet' cannot be made: .*matrix"),
        (lambda path: change(path, rows=4), r"the prompt of 'monet' cannot be made: .*size mismatch for matrix"),
        (
            lambda path: change(path, form="lines"),
            r"the prompt of 'monet' cannot be made: prompt.form: 'lines' is none of",
        ),
        (lambda path: change(path, colour=1), "the prompt of 'monet' cannot be made: .*colour"),
        (lambda path: change(path, template=None), "the prompt of 'monet' cannot be made: .*template"),
        (lambda path: change(path, width=4), "the prompt of 'monet' has width 4, .*; the text model .* has width 8$"),
        (lambda path: change(path, width=None), "the prompt of 'monet' has width None, "),
    ],
)
def test_files_that_are_no_bank_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    path = tmp_path / "bank.safetensors"
    bank_of("cezanne", "monet").save(path)
    damage(path)
    with pytest.raises(ValueError, match=rf"^{path}: {said}") as error:
        load_bank(path, artbank_prompt, "artbank", 8)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_artists_that_a_bank_would_not_take_are_named_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    one, other = bank_of("monet"), bank_of("cezanne", width=16)
    tensors = {
        f"{artist}.{key}": tensor
        for bank in (one, other)
        for artist in bank
        for key, tensor in bank[artist].state_dict().items()
    }
    settings = {artist: bank[artist].settings for bank in (one, other) for artist in bank}
    save_file(tensors, path, {"method": "artbank", "artists": json.dumps(settings)})
    with pytest.raises(
        ValueError,
        match=rf"^{path}: the prompt of 'cezanne' cannot be made: artist: 'cezanne' has width 16, the others",
    ):
        load_bank(path, artbank_prompt, "artbank")
    tensors = {f"a/b.{key}": tensor for key, tensor in one["monet"].state_dict().items()}
    save_file(tensors, path, {"method": "artbank", "artists": json.dumps({"a/b": one["monet"].settings})})
    with pytest.raises(ValueError, match=rf"^{path}: the prompt of 'a/b' cannot be made: artist: 'a/b' is not a name"):
        load_bank(path, artbank_prompt, "artbank")


@pytest.mark.parametrize(("width", "fits"), [(0, True), (8, True), (64, False)])
def test_the_width_must_be_the_text_models(tmp_path: Path, width: int, fits: bool) -> None:
    path = tmp_path / "bank.safetensors"
    bank_of("monet").save(path)
    if fits:
        assert list(load_bank(path, artbank_prompt, "artbank", width)) == ["monet"]
        return
    said = rf"^{path}: the prompt of 'monet' has width 8, learnt with 'somewhere/a model'; .* has width 64$"
    with pytest.raises(ValueError, match=said):
        load_bank(path, artbank_prompt, "artbank", width)
