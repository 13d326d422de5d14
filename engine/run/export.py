"""Export: the plain network's weights, for the framework it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.utilities.files import replaced


def export_model(
    model: nn.Module, target: Path, form: Callable[[Mapping[str, Tensor], Path], Any] = lambda state, target: state
) -> None:
    """Write the plain network's weights under its own names: safetensors, or a torch file for other suffixes.

    Nothing auxiliary is in it; ``model.load_state_dict(..., strict=True)`` takes it.

    Args:
        form: what a torch file holds, made of the weights: a task's ``export``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replaced(target) as partial:
        if target.suffix == ".safetensors":
            save_file(state, partial)
        else:
            torch.save(form(state, target), partial)
