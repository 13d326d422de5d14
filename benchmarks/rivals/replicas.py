"""torch's own data parallelism, DDP and FSDP2: each rank trains on its part of the batch."""

from __future__ import annotations

from abc import abstractmethod

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rivals.rival import Place, Rival, load_network
from benchmarks.rivals.stage import Stage
from engine.learning.optimizer import build_optimizer


def share(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's samples; all ranks get equally many.

    Raises:
        ValueError: the samples cannot be divided evenly.
    """
    if len(tensor) % ranks:
        raise ValueError(f"data.batch: {len(tensor)} samples cannot be divided evenly among {ranks} ranks")
    return tensor.chunk(ranks)[rank]


class Replica(Rival):
    """Forward and backward of the whole network on this rank's samples; gradients are averaged over ranks."""

    def __init__(self, place: Place) -> None:
        chain, message = load_network(place)
        self.x, self.y = (share(tensor, place.rank, place.entry.ranks) for tensor in (message.x, message.targets))
        self.task = place.task
        self.network = self.wrap(Stage(chain))
        self.optimizer = build_optimizer(place.config.optimizer, [*self.network.named_parameters()])

    @abstractmethod
    def wrap(self, network: Stage) -> nn.Module:
        """Have the library average the network's gradients over the ranks, or shard the whole network."""

    def step(self) -> Tensor:
        loss = self.task.loss(self.network(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ddp(Replica):
    """Gradients live in the buckets that they are sent from, which saves a copy."""

    def wrap(self, network: Stage) -> nn.Module:
        return DistributedDataParallel(network, gradient_as_bucket_view=True)


class Fsdp(Replica):
    """Every unit is sharded as a group of its own and gathered when it runs."""

    def wrap(self, network: Stage) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in network.parts:
            if any(True for _ in part.parameters()) and not isinstance(part, nn.ModuleList):
                fully_shard(part, mesh=mesh)
        fully_shard(network, mesh=mesh)
        return network
