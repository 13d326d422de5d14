"""Leave frozen weights, which have a file of their own, out of checkpoints."""

from __future__ import annotations

from typing import Any

from torch import nn


def leave_out_frozen(model: nn.Module) -> None:
    """Remove buffers and frozen parameters from the model's state, and therefore from checkpoints.

    This serves networks that train a few parameters on top of a large frozen model which has a file of its own, such as
    the prompts of a frozen denoiser or the matrices of LoRA. Afterwards, ``state_dict`` returns and ``load_state_dict``
    expects trainable parameters only. A parameter counts as frozen if it is frozen at the time of this call. A task
    with such a model sets ``reads_frozen``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
        >>> leave_out_frozen(model)
        >>> list(model.state_dict())
        ['1.weight', '1.bias']
    """
    learns = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}

    # Hooks rather than overridden methods: the model's class and its source stay as they are.
    def drop(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name[len(prefix) :] not in learns]:
            del state[name]

    def forgive(_: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in learns]

    model.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
