"""A bank of prompts: several artists in one file, which can be added, removed and chosen by name."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.utilities.files import replaced
from engine.utilities.text import none_of, one_line

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]*")


class Prompt(nn.Module, ABC):
    """What training has learnt about one artist.

    Args:
        settings: everything that it takes to make another prompt of this kind, in values that JSON can hold: at least
            ``method``, ``form``, ``template``, ``width`` (of the text model), ``tokens`` (number of placeholders),
            ``scale`` (of the text model's token embeddings) and ``base`` (the checkpoint that it was learnt with, as
            information for people).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)

    @abstractmethod
    def forward(self) -> Tensor:
        """Vectors for the placeholders: (times, layers, tokens, width).

        ``times`` counts equal parts of the timesteps, starting with the part that is denoised last. ``layers`` counts
        the prompts that different layers of the denoiser read. Either may be 1.
        """


class PromptBank(Mapping[str, Prompt]):
    """Prompts by the name of the artist, all for the same method.

    Example:
        >>> from tasks.style_transfer.artbank.prompts import new_prompt
        >>> bank = PromptBank("artbank")
        >>> bank.add("monet", new_prompt(form="released", template="a painting by {artist} *", width=8))
        >>> list(bank)
        ['monet']
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self._prompts: dict[str, Prompt] = {}

    def __getitem__(self, artist: str) -> Prompt:
        """Raises ValueError if no artist has that name; the message lists the known ones."""
        if artist not in self._prompts:
            raise ValueError(f"artist: {none_of(artist, sorted(self._prompts))}")
        return self._prompts[artist]

    def __repr__(self) -> str:
        return f"PromptBank({self.method!r}, artists={sorted(self._prompts)})"

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, artist: object) -> bool:
        return artist in self._prompts

    def get(self, artist: str, default: Any = None) -> Any:
        """The artist's prompt, or ``default`` if no artist has that name."""
        return self._prompts.get(artist, default)

    def add(self, artist: str, prompt: Prompt) -> None:
        """Add an artist, or replace an artist's prompt.

        Raises:
            ValueError: the name cannot stand in files and texts, or the prompt has another method or another width.
        """
        check_artist(artist)
        if prompt.settings["method"] != self.method:
            raise ValueError(
                f"artist: {artist!r} is a prompt of {prompt.settings['method']}, this bank is of {self.method}"
            )
        for other in self._prompts.values():
            if other.settings["width"] != prompt.settings["width"]:
                raise ValueError(
                    f"artist: {artist!r} has width {prompt.settings['width']}, the others of this bank have "
                    f"{other.settings['width']}"
                )
        self._prompts[artist] = prompt

    def remove(self, artist: str) -> Prompt:
        """Remove an artist and return the prompt; the others stay as they are.

        Raises:
            ValueError: no artist has that name; the message lists the known ones.
        """
        self[artist]
        return self._prompts.pop(artist)

    def save(self, path: Path) -> None:
        """Write a safetensors file: ``ARTIST.tensor``, and each artist's settings as JSON in its metadata.

        Raises:
            WriteError: the disk is full, for example.
        """
        tensors = {
            f"{artist}.{name}": tensor.detach().cpu().contiguous().clone()
            for artist, prompt in self._prompts.items()
            for name, tensor in prompt.state_dict().items()
        }
        settings = {artist: prompt.settings for artist, prompt in self._prompts.items()}
        with replaced(path) as partial:
            save_file(tensors, partial, {"method": self.method, "artists": json.dumps(settings)})


def check_artist(artist: str) -> None:
    """Check that a name can stand in files and texts.

    Raises:
        ValueError: it cannot.
    """
    if not _NAME.fullmatch(artist):
        raise ValueError(f"artist: {artist!r} is not a name; letters, digits, spaces, '_' and '-' make one")


def load_bank(path: Path, make: Any, method: str, width: int = 0) -> PromptBank:
    """The bank in a file.

    Args:
        make: makes a prompt from its settings; ``new_prompt`` of a method.
        method: the method that the bank must have.
        width: the width that the text model of its prompts must have; 0 accepts any.

    Raises:
        ValueError: there is no such file, it is not a bank of this method, or its prompts have another width.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of prompts")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        found, artists = metadata.get("method"), json.loads(metadata.get("artists", "null"))
    except Exception as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error, 200)}") from error
    if not found or not isinstance(artists, dict) or not all(isinstance(each, dict) for each in artists.values()):
        raise ValueError(f"{path}: holds no prompts: a bank's metadata have `method` and `artists`")
    if found != method:
        raise ValueError(f"{path}: has prompts of {found}, not of {method}")
    bank = PromptBank(method)
    for artist, settings in artists.items():
        if width and settings.get("width") != width:
            raise ValueError(
                f"{path}: the prompt of {artist!r} has width {settings.get('width')}, learnt with "
                f"{settings.get('base')!r}; the text model of this checkpoint has width {width}"
            )
        try:
            prompt = make(**{key: value for key, value in settings.items() if key != "method"})
            own = {name.removeprefix(f"{artist}."): t for name, t in tensors.items() if name.startswith(f"{artist}.")}
            prompt.load_state_dict(own)
            bank.add(artist, prompt)
        except Exception as error:
            raise ValueError(f"{path}: the prompt of {artist!r} cannot be made: {one_line(error, 200)}") from error
    return bank
