"""Frozen weights that have a file of their own are left out of checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn


def leave_out_frozen(model: nn.Module) -> None:
    """Leave parameters that do not learn, and buffers, out of the model's state, and so of checkpoints.

    For networks that learn a little beside something large, which comes from a file that stays where it is: prompts
    of a frozen denoiser, LoRA's matrices. ``state_dict`` and ``load_state_dict`` then know the rest alone. What is
    frozen at the moment of this call counts. A task of such a model says so by ``reads_frozen``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
        >>> leave_out_frozen(model)
        >>> list(model.state_dict())
        ['1.weight', '1.bias']
    """
    learns = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name[len(prefix) :] not in learns]:
            del state[name]

    def forgive(_: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in learns]

    model.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
