"""Instance normalisation that can take its statistics from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

EPSILON = 1e-5

Statistics = tuple[Tensor, Tensor]
"""Mean and deviation per instance and channel, (N, C, 1, 1)."""


def instance_statistics(x: Tensor) -> Statistics:
    """Statistics of ``x`` (N, C, H, W) in fp32; the deviation is that of a population, not of a sample, and never 0.

    Example:
        >>> mean, deviation = instance_statistics(torch.tensor([[[[1.0, 3.0]]]]))
        >>> mean.item(), round(deviation.item(), 4)
        (2.0, 1.0)
    """
    variance, mean = torch.var_mean(x.float(), (2, 3), correction=0, keepdim=True)
    return mean, (variance + EPSILON).sqrt()


class InstanceNorm(nn.Module):
    """scale (x - mean) / deviation + bias, with mean and deviation per instance and channel; nothing is learnt.

    A tile of a large picture is normalised with the statistics of the whole picture (thumbnail instance normalisation,
    Chen et al. 2022, arXiv 2103.11784), which ``given`` holds. If ``notes`` is set, ``seen`` keeps the statistics of
    the last call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: Statistics | None = None
        self.seen: Statistics | None = None
        self.notes = False

    def forward(self, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Normalise maps (N, C, H, W); ``scale`` and ``bias`` are (N, C, 1, 1)."""
        if self.notes:
            self.seen = instance_statistics(x) if self.given is None else self.given
        # Batch normalisation of one sample with N C channels does the same, but is fused and keeps only its input for
        # backward.
        scale, bias = (None if each is None else each.flatten().float() for each in (scale, bias))
        mean, variance = (None, None) if self.given is None else self._given(x)
        every = x.reshape(1, -1, *x.shape[2:])
        normal = torch.batch_norm(every, scale, bias, mean, variance, self.given is None, 0.0, EPSILON, False)
        return normal.view(x.shape)

    def _given(self, x: Tensor) -> Statistics:
        """The mean and variance to use for every channel of every picture."""
        assert self.given is not None
        mean, deviation = (each.expand(*x.shape[:2], 1, 1).flatten() for each in self.given)
        return mean, deviation.square() - EPSILON


def look(network: nn.Module) -> dict[str, Statistics]:
    """The statistics that every ``InstanceNorm`` in ``network`` saw in its last call, by name."""
    norms = {name: module for name, module in network.named_modules() if isinstance(module, InstanceNorm)}
    return {name: norm.seen for name, norm in norms.items() if norm.seen is not None}


def give(network: nn.Module, statistics: Mapping[str, Statistics] | None, notes: bool = False) -> None:
    """Have every ``InstanceNorm`` in ``network`` use ``statistics`` (None: its input's); with ``notes``, keep them."""
    for name, module in network.named_modules():
        if isinstance(module, InstanceNorm):
            module.given = None if statistics is None else statistics.get(name)
            module.notes, module.seen = notes, None
