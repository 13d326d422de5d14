"""Units as one plain module that maps a tensor to a tensor, which is what other libraries take."""

from __future__ import annotations

from torch import Tensor, nn

from engine.network.chain import Chain, Unit
from engine.network.message import Message


class Stage(nn.Module):
    """Units ``start`` to ``stop - 1`` of a chain, with the head if they are the last.

    Raises:
        ValueError: messages between the chain's units carry more than ``x``.
    """

    def __init__(self, chain: Chain, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        for unit, message in zip(chain.units, chain.shapes(), strict=True):
            if list(message.features) != ["x"]:
                names = ", ".join(message.features)
                raise ValueError(f"model.name: {unit.name!r} passes on {names}; this benchmark takes x alone")
        units: list[Unit] = [*chain.units, chain.head]
        stop = len(chain) if stop is None else stop
        self.units = units[start : stop + (stop == len(chain))]
        self.parts = nn.ModuleList([unit.module for unit in self.units])

    def forward(self, x: Tensor) -> Tensor:
        message = Message({"x": x})
        for unit in self.units:
            message = unit(message)
        # torch's zero-bubble schedules detach a stage's output in place, which a view does not allow.
        return message.x.clone() if message.x._is_view() else message.x


def drop_others(chain: Chain, *kept: Stage) -> None:
    """Free the weights of all units except those in ``kept``; a head's forward may still refer to the model."""
    own = {id(part) for stage in kept for part in stage.parts}
    for unit in [*chain.units, chain.head]:
        if id(unit.module) not in own:
            unit.module.to("meta")
