"""DeepSpeed's ZeRO-1, -2 and -3, and its PipelineModule."""

from __future__ import annotations

import itertools
import logging
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor

from benchmarks.rivals.replicas import share
from benchmarks.rivals.rival import Place, Rival, load_network
from benchmarks.rivals.stage import Stage, drop_others
from engine.learning.optimizer import build_optimizer

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _initialize(place: Place, network: Any, batch: int, more: dict[str, Any]) -> Any:
    """DeepSpeed's engine around ``network``, with the same optimizer as all other rivals."""
    ranks = 1 if isinstance(network, PipelineModule) else place.entry.ranks
    parts = place.entry.micro_batches
    settings = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // parts // ranks,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": 0.0,  # the default, 1.0, would slow learning down
        "steps_per_print": 10**9,
        **more,
    }
    optimizer = build_optimizer(place.config.optimizer, [*network.named_parameters()])
    return deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]


class Zero(Rival):
    """Optimizer state (1), also gradients (2), and also parameters (3) are sharded over the ranks."""

    stage: ClassVar[int]

    def __init__(self, place: Place) -> None:
        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
        chain, message = load_network(place)
        self.x, self.y = (share(tensor, place.rank, place.entry.ranks) for tensor in (message.x, message.targets))
        self.task, network = place.task, Stage(chain)
        size = sum(parameter.numel() for parameter in network.parameters())
        more = {
            # The default, 5e8 elements, would be 2 GB a buffer whatever the network.
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": size, "allgather_bucket_size": size},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine = _initialize(place, network, message.batch, more)

    def step(self) -> Tensor:
        loss = self.task.loss(self.engine(self.x), self.y)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3


class Pipe(Rival):
    """PipelineModule with its 1F1B schedule; each stage is one of its layers, so that it is cut like the others."""

    def __init__(self, place: Place) -> None:
        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
        chain, message = load_network(place)
        stages = [Stage(chain, *bounds) for bounds in itertools.pairwise(place.entry.bounds)]
        network = PipelineModule(
            stages, num_stages=place.entry.ranks, loss_fn=place.task.loss, partition_method="uniform"
        )
        drop_others(chain, stages[place.rank])
        del stages
        self.engine = _initialize(place, network, message.batch, {"zero_optimization": {"stage": 0}})
        parts = (tensor.chunk(place.entry.micro_batches) for tensor in (message.x, message.targets))
        self.data = itertools.cycle(list(zip(*parts, strict=True)))

    def step(self) -> Tensor:
        loss = self.engine.train_batch(self.data)
        return torch.as_tensor(loss).detach()
