"""Replicas that shard optimizer state, gradients or parameters: DeepSpeed's ZeRO around one block."""

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

from engine.distributed.replication.base import Replication
from engine.distributed.replication.extension import prepare_extension
from engine.learning.block import Block
from engine.learning.optimizer import MakeOptimizer, Named
from engine.learning.outcome import Refusal
from engine.network.message import Message

COUNTERS = ("step",)
"""Optimizer state with one number per parameter; all other state has the parameter's shape."""
BUCKET = 50_000_000
"""Largest number of elements that DeepSpeed collects before it sends them. It allocates this many at once, so a smaller
block asks for fewer."""


class Zero(Replication):
    """ZeRO with one DeepSpeed engine per block.

    ``stage`` 1 shards optimizer state, 2 shards gradients as well, and 3 shards parameters as well. Weights, gradients
    and optimizer state are fp32.

    Known limitations: DeepSpeed flattens the parameters, so all parameters of the units have one step counter, and so
    have those of the auxiliary network. A parameter that takes no part in the loss has a gradient of 0 here, and weight
    decay still changes it; elsewhere the optimizer leaves it alone. All replicas must run the same layers, so they draw
    the same dropout, and a network that chooses layers by its input is refused.

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
            "stage3_param_persistence_threshold": 0,  # by default ZeRO-3 keeps small parameters whole
            "overlap_comm": block.device.type == "cuda",
        }
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": block.device.type == "cuda"}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # required, but DeepSpeed uses it only for its own statistics
            "gradient_accumulation_steps": 1,
            "gradient_clipping": block.clip_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }
        with _set_up(self.deepspeed, group):
            self.engine = self.deepspeed.initialize(
                model=self.whole, optimizer=inner, config=settings, mpu=_Ranks(group), dist_init_required=False
            )[0]
        self.sharded = self.engine.optimizer
        block.optimizer = self.sharded  # the trainer sets the learning rate on the optimizer that really steps

    def train_forward(self, message: Message, update: bool) -> tuple[Message, Tensor]:
        self.engine.set_gradient_accumulation_boundary(update)
        result: tuple[Message, Tensor] = self.engine(message)
        return result

    def train_backward(self, loss: Tensor) -> None:
        """Run backward from the loss.

        Raises:
            Refusal: a parameter takes part in the loss of some replicas only.
        """
        self._check_same_parameters(loss)
        self.engine.backward(loss)
        # DeepSpeed counts micro-batches in step(). At a boundary step() also updates, so ``train_update`` calls it
        # there.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def train_update(self) -> Tensor:
        """Clip, step and free the gradients; return the gradient norm of the whole block (nan without clipping).

        Raises:
            FloatingPointError: a gradient is not finite. DeepSpeed itself would silently skip the update.
        """
        self.engine.step()
        if not self.engine.was_step_applied():
            raise FloatingPointError("a gradient is not finite")
        norm = self.engine.get_global_grad_norm() if self.block.clip_norm > 0 else float("nan")
        return torch.as_tensor(norm, dtype=torch.float32, device=self.block.device)

    def _check_same_parameters(self, loss: Tensor) -> None:
        named = [(name, parameter) for name, parameter in self.block.parameters_by_name() if parameter.requires_grad]
        reached = _leaves(loss)
        count = torch.tensor([id(parameter) in reached for _, parameter in named], dtype=torch.int32)
        dist.all_reduce(count, group=self.group)
        replicas = dist.get_world_size(self.group)
        for (name, _), used in zip(named, count.tolist(), strict=True):
            if 0 < used < replicas:
                raise Refusal(
                    f"placement.replication: with zero{self.stage}, all replicas must use the same parameters, but "
                    f"{name!r} takes part in the loss of {used} of {replicas} replicas; use ddp or fsdp"
                )

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        # This gathers all parameters, and removes the hooks that would otherwise gather and release them module by
        # module, which would make every forward pass a collective call.
        with self.deepspeed.runtime.zero.stage3.unwrap_model_for_generation(self.engine):
            yield

    def tensors(self) -> dict[str, Tensor]:
        with self.gathered():
            return {name: t.detach().clone() if self.stage == 3 else t for name, t in super().tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        named = {name: p for name, p in self.block.parameters_by_name() if name in tensors}
        if self.stage == 3:
            # modifier_rank is the rank within the group, not the global one. Every replica writes the same values.
            with self.deepspeed.zero.GatheredParameters(list(named.values()), modifier_rank=0):
                super().load_tensors(tensors)
        else:
            super().load_tensors(tensors)
        # The optimizer updates flat fp32 copies of the parameters, and would overwrite what was loaded.
        for name, parameter in named.items():
            if parameter.requires_grad:
                self._set(parameter, tensors[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        self._link()
        # Counters are the same on all replicas. Everything else is sharded, and ``get`` collects it from all of them.
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
        # First create state of the right shape for every flat tensor, since DeepSpeed can only fill in what exists.
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
        """Let each parameter find its shard of the optimizer state; DeepSpeed itself does so for one group only."""
        if self.stage == 3:
            return
        groups, flats = self.sharded.bit16_groups, self.sharded.single_partition_of_fp32_groups
        for group, flat in zip(groups, flats, strict=True):
            if flat in self.inner.state:
                self.deepspeed.utils.lazy_init_hp_params_optimizer_state(group, flat, self.inner.state)

    def _shares(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """For every trainable parameter: name, parameter, and the flat tensor that holds this replica's shard of it."""
        names = {id(parameter): name for name, parameter in self.block.parameters_by_name()}
        groups, flats = (
            (self.sharded.fp16_groups, self.sharded.fp32_partitioned_groups_flat)
            if self.stage == 3
            else (self.sharded.bit16_groups, self.sharded.single_partition_of_fp32_groups)
        )
        pairs: Iterable[tuple[list[nn.Parameter], Tensor]] = zip(groups, flats, strict=True)
        return [(names[id(parameter)], parameter, flat) for group, flat in pairs for parameter in group]

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str = "") -> None:
        """Store this replica's shard of a whole parameter, or of its optimizer state ``key``."""
        utils, more = self.deepspeed.utils, (key,) if key else ()
        if self.stage < 3:
            (utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param)(parameter, value, *more)
            return
        # ZeRO-3 cuts the flattened parameter into equal shards and pads the last one.
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(size * dist.get_world_size(self.group))
        padded[: value.numel()] = value.flatten()
        share = padded[size * self.rank : size * (self.rank + 1)]
        (utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param)(parameter, share, *more)


def _leaves(loss: Tensor) -> set[int]:
    """Identities of the parameters that take part in ``loss``."""
    seen: set[Any] = set()
    found, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))  # only the nodes that accumulate gradients have one
        nodes.extend(following for following, _ in node.next_functions)
    return found


@dataclass(frozen=True)
class _Ranks:
    """Tells DeepSpeed which ranks are replicas of this one, through the interface of Megatron's ``mpu``."""

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
    """Import DeepSpeed for ``device``, without its log lines.

    Raises:
        ValueError: it is not installed, or cannot be imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed takes the GPU whose number is LOCAL_RANK. torchrun's value is the same, unless ranks share a GPU.
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
    if device.type == "cpu":
        prepare_extension()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # again, because the import sets another level
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    # ZeRO-3 compares the order in which modules run with that of global rank 0, which may belong to another stage and
    # so have other modules.
    vars(coordinator)["assert_ints_same_as_other_ranks"] = lambda ints: None
    return deepspeed


@contextmanager
def _set_up(deepspeed: Any, group: dist.ProcessGroup) -> Iterator[None]:
    """A context for DeepSpeed's initialisation, in which its barriers cover ``group`` only and it prints nothing.

    A barrier of all ranks would hang, because ranks of other stages have other blocks to initialise.
    """
    barrier = deepspeed.comm.barrier
    deepspeed.comm.barrier = functools.partial(barrier, group=group)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        deepspeed.comm.barrier = barrier


def _split(optimizer: Optimizer, named: Named) -> None:
    """Give the parameters of the auxiliary network a group of their own.

    DeepSpeed keeps one step counter per group, and after a resume with other blocks only the auxiliary network's state
    starts fresh.
    """
    own = {id(parameter) for name, parameter in named if name.startswith("auxiliary.")}
    (group,) = optimizer.param_groups
    apart = [parameter for parameter in group["params"] if id(parameter) in own]
    rest = [parameter for parameter in group["params"] if id(parameter) not in own]
    if apart and rest:
        group["params"] = rest
        optimizer.add_param_group({"params": apart})
