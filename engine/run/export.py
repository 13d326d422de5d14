"""Export: the weights of the plain network, for the framework that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.network.state import tensors_of
from engine.utilities.files import replaced

TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt")
"""How the names of torch files end."""


def export_model(
    model: nn.Module, target: Path, form: Callable[[Mapping[str, Tensor], Path], Any] = lambda state, target: state
) -> None:
    """Write the weights of the plain network under its own names, without any auxiliary weight.

    ``model.load_state_dict(..., strict=True)`` accepts the result. A torch file has the extra state of modules as well
    (``get_extra_state``), for which safetensors has no place.

    Args:
        target: the file to write; with the suffix ``.safetensors`` in that format, with one of
            ``TORCH_FILES`` as a torch file.
        form: turns the weights into the object that a torch file holds (see ``Task.export``).

    Raises:
        ValueError: the file has another suffix.
    """
    if target.suffix not in (".safetensors", *TORCH_FILES):
        raise ValueError(
            f"--out: {target} does not end in .safetensors, nor for torch.load in {', '.join(TORCH_FILES)}; no other "
            "format is written"
        )
    # safetensors refuses tensors that share memory or are not contiguous, and tied weights do share it.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(model).items()}
    with replaced(target) as partial:
        if target.suffix == ".safetensors":
            save_file(state, partial)
        else:
            extra = {name: value for name, value in model.state_dict().items() if name not in state}
            content = form({**state, **extra}, target)
            with partial.open("wb") as file:
                torch.save(content, file)
