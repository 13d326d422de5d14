"""Replicas that share optimizer state, gradients, parameters: DeepSpeed's ZeRO around one block."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.distributed.replication.protocol import Replication, Whole
from engine.learning.block import Block
from engine.learning.optimizer import MakeOptimizer, Named
from engine.network.message import Message

COUNTERS = ("step",)
"""State of torch's optimizers that is one number a parameter; all else has the parameter's shape."""
BUCKET = 50_000_000
"""Most elements that DeepSpeed collects before it sends; it allocates so many, whatever the block has."""


class Zero(Replication):
    """ZeRO of ``stage`` 1 (optimizer state shared), 2 (gradients too) or 3 (parameters too); one engine a block.

    Weights, gradients and optimizer state are fp32. DeepSpeed flattens the parameters, so those of units and those
    of the auxiliary network each count their steps together. A parameter that takes no part in the loss has a
    gradient of 0 here, where elsewhere the optimizer leaves it alone.

    Raises:
        ValueError: DeepSpeed is not installed.
    """

    def __init__(
        self, block: Block, group: dist.ProcessGroup, make_optimizer: MakeOptimizer, stage: int, offload: bool
    ) -> None:
        super().__init__(block, group)
        self.stage, self.deepspeed = stage, _deepspeed(f"zero{stage}", block.device)
        block.attach(make_optimizer)
        inner: Optimizer = block.optimizer  # type: ignore[assignment]
        _split(inner, block.parameters_by_name())
        self.inner = inner
        elements = sum(p.numel() for p in block.parameters() if p.requires_grad)
        zero: dict[str, Any] = {
            "stage": stage,
            "reduce_bucket_size": min(elements, BUCKET),
            "stage3_param_persistence_threshold": 0,  # small parameters are shared too
            "overlap_comm": block.device.type == "cuda",
        }
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": block.device.type == "cuda"}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # wanted, and used for nothing but its own figures
            "gradient_accumulation_steps": 1,
            "gradient_clipping": block.clip_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }
        whole = Whole(block)
        with _set_up(self.deepspeed, group):
            self.engine = self.deepspeed.initialize(
                model=whole, optimizer=inner, config=settings, mpu=_Ranks(group), dist_init_required=False
            )[0]
        self.sharded = self.engine.learning.optimizer
        block.optimizer = self.sharded

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        self.engine.set_gradient_accumulation_boundary(update)
        result: tuple[Message, Tensor] = self.engine(message)
        return result

    def train_backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        # Counts micro-batches; at a boundary, where it would step, ``train_update`` calls it.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def train_update(self) -> Tensor:
        """As elsewhere.

        Raises:
            FloatingPointError: a gradient is not finite; DeepSpeed would skip the update and go on.
        """
        self.engine.step()
        if not self.engine.was_step_applied():
            raise FloatingPointError("a gradient is not finite")
        norm = self.engine.get_global_grad_norm() if self.block.clip_norm > 0 else float("nan")
        return torch.as_tensor(norm, dtype=torch.float32, device=self.block.device)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        # Gathers the parameters and takes off the hooks that would gather them again, unit by unit.
        with self.deepspeed.runtime.zero.stage3.unwrap_model_for_generation(self.engine):
            yield

    def tensors(self) -> dict[str, Tensor]:
        with self.gathered():
            return {name: t.detach().clone() if self.stage == 3 else t for name, t in super().tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        named = {name: p for name, p in self.block.parameters_by_name() if name in tensors}
        if self.stage == 3:
            # The rank is counted within the group.
            with self.deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=0):
                super().load_tensors(tensors)
        else:
            super().load_tensors(tensors)
        # The optimizer works on copies.
        for name, parameter in named.items():
            if parameter.requires_grad:
                self._set(parameter, tensors[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        self._link()
        get = self.deepspeed.utils.safe_get_full_optimizer_state
        state = {}
        for name, parameter, flat in self._shares():
            for key, value in self.inner.state.get(flat, {}).items():
                if value is not None:
                    state[f"{name}:{key}"] = torch.as_tensor(value) if key in COUNTERS else get(parameter, key)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self.inner.state.clear()
        shares = self._shares()
        saved: dict[str, dict[str, Tensor]] = {name: {} for name, _, _ in shares}
        for full, value in state.items():
            name, key = full.rsplit(":", 1)
            if name in saved:
                saved[name][key] = value
        for name, _, flat in shares:
            for key, value in saved[name].items():
                own = self.inner.state.setdefault(flat, {})
                if key not in COUNTERS:
                    own.setdefault(key, torch.zeros_like(flat))
                elif not torch.equal(own.setdefault(key, value.cpu().clone()), value.cpu()):
                    raise ValueError(
                        f"placement.replication: zero{self.stage} counts the steps of all parameters together, "
                        f"but {name!r} has taken {value:g} where others have not; use ddp or fsdp"
                    )
        self._link()
        for name, parameter, _ in shares:
            for key, value in saved[name].items():
                if key not in COUNTERS:
                    self._set(parameter, value, key)

    def _link(self) -> None:
        """Let each parameter find its share of the optimizer's state (DeepSpeed itself links one group only)."""
        if self.stage == 3:
            return
        groups, flats = self.sharded.bit16_groups, self.sharded.single_partition_of_fp32_groups
        for group, flat in zip(groups, flats, strict=True):
            if flat in self.inner.state:
                self.deepspeed.utils.lazy_init_hp_params_optimizer_state(group, flat, self.inner.state)

    def _shares(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Name, parameter, and the flat tensor that has this replica's share of it, of all that are trained."""
        names = {id(parameter): name for name, parameter in self.block.parameters_by_name()}
        groups, flats = (
            (self.sharded.fp16_groups, self.sharded.fp32_partitioned_groups_flat)
            if self.stage == 3
            else (self.sharded.bit16_groups, self.sharded.single_partition_of_fp32_groups)
        )
        pairs: Iterable[tuple[list[nn.Parameter], Tensor]] = zip(groups, flats, strict=True)
        return [(names[id(parameter)], parameter, flat) for group, flat in pairs for parameter in group]

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str = "") -> None:
        """Take this replica's share of a whole parameter, or of its optimizer state ``key``."""
        utils, more = self.deepspeed.utils, (key,) if key else ()
        if self.stage < 3:
            (utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param)(parameter, value, *more)
            return
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(size * dist.get_world_size(self.group))
        padded[: value.numel()] = value.flatten()
        share = padded[size * self.rank : size * (self.rank + 1)]
        (utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param)(parameter, share, *more)


@dataclass(frozen=True)
class _Ranks:
    """Tells DeepSpeed, as Megatron's ``mpu`` does, which ranks are replicas of this one; no tensors are split."""

    group: dist.ProcessGroup

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.group)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def _deepspeed(kind: str, device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed takes the GPU of this number; torchrun has set it to the same, unless ranks share a GPU.
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device() if device.index is None else device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            deepspeed = importlib.import_module("deepspeed")
            coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    except ImportError as error:
        raise ValueError(
            f"placement.replication: {kind} needs deepspeed ({error}); pip install deepspeed, or use ddp or fsdp"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it has set another
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    # ZeRO-3 compares the order of modules with rank 0 of all ranks, which may be of another stage.
    vars(coordinator)["assert_ints_same_as_other_ranks"] = lambda ints: None
    return deepspeed


@contextmanager
def _set_up(deepspeed: Any, group: dist.ProcessGroup) -> Iterator[None]:
    """No barriers of all ranks, for those of another stage have other blocks; no words to the terminal."""
    barrier = deepspeed.comm.barrier
    deepspeed.comm.barrier = functools.partial(barrier, group=group)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        deepspeed.comm.barrier = barrier


def _split(optimizer: Optimizer, named: Named) -> None:
    """Give the auxiliary network's parameters a group of their own: their state may start afresh alone."""
    own = {id(parameter) for name, parameter in named if name.startswith("auxiliary.")}
    (group,) = optimizer.param_groups
    apart = [parameter for parameter in group["params"] if id(parameter) in own]
    rest = [parameter for parameter in group["params"] if id(parameter) not in own]
    if apart and rest:
        group["params"] = rest
        optimizer.add_param_group({"params": apart})
