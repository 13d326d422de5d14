"""A detector that MMEngine trains; a training step is one local step of every block."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from mmdet.models.detectors.base import BaseDetector
from mmengine.config import Config as PlainConfig
from mmengine.config import ConfigDict
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn

from engine.config import Config
from engine.learning.block import Block
from engine.learning.build import build_blocks
from engine.memory.footprint import Followed
from engine.memory.tracker import MemoryTracker, Moment
from engine.network.message import Message
from engine.run.checkpoint import AUXILIARY, Division
from tasks.detection.chain import detector_chain
from tasks.detection.optim_wrapper import (
    BlockOptimWrappers,
    names_end_to_end,
    names_in_order,
    optimizer_by_name,
    part_of,
)
from tasks.detection.targets import targets_of
from tasks.detection.task import Detection


class GivenDetector(Detection):
    """The task of a detector that MMEngine builds, feeds and evaluates; only loss and auxiliary heads are used."""

    def __init__(self, model: ConfigDict) -> None:
        # Detection.__init__ is not called, since it would change MMDetection's scope and log.
        self.plain = PlainConfig({"model": model})
        self._failures = {}


class DrivenBlock(Block):
    """A block whose optimizer wrapper does everything after the forward pass: scale, accumulate, clip, update, free.

    The forward pass and the loss run in the wrapper's context, in which AMP casts.
    """

    wrapper: OptimWrapper

    def drive(self, wrapper: OptimWrapper) -> None:
        self.wrapper, self.optimizer = wrapper, wrapper.optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.wrapper.optim_context(self)
        return context

    def train_backward(self, loss: Tensor) -> None:
        scaler = getattr(self.wrapper, "loss_scaler", None)
        before = scaler.get_scale() if scaler is not None else 0
        self.wrapper.update_params(loss)
        self.skipped += scaler is not None and scaler.get_scale() < before

    def train_update(self) -> Tensor:
        """Do nothing: ``update_params`` has updated the weights already, unless it is accumulating gradients."""
        return torch.full((), float("nan"))


@MODEL_WRAPPERS.register_module()
class LocalModel(nn.Module):
    """A detector that is cut into blocks, with an auxiliary network for every block but the last.

    ``module`` is the detector. MMEngine saves, loads and evaluates only ``module``, so that checkpoints have its own
    names and nothing auxiliary. Its losses are logged under their own names, and each block's loss as ``blockK/loss``.

    Args:
        module: the detector that the runner has built, on the runner's device.
        config: the model's MMDetection config.
        settings: the settings in ``local``, and the seed.

    Raises:
        ValueError: the detector is not a chain or cannot be cut as asked, or the auxiliary network does not fit.
    """

    def __init__(self, module: BaseDetector, config: ConfigDict, settings: Config) -> None:
        super().__init__()
        self.module, self.settings = module, settings
        self.task = GivenDetector(config)
        device = torch.device(get_device())
        # Shapes are inferred and weights drawn on the CPU, so that they do not depend on the device.
        self.blocks = self._build(module.cpu())
        module.to(device)
        # The blocks are not registered: their train() would set normalisations that the backbone keeps frozen to
        # training.
        self.auxiliaries = nn.ModuleList([block.auxiliary for block in self.blocks if block.auxiliary]).to(device)
        self.optim_wrapper: BlockOptimWrappers | None = None
        self.optim_config = ConfigDict()
        self.measuring = False
        self.peaks: dict[int, Moment] = {}

    def _build(self, detector: BaseDetector) -> list[DrivenBlock]:
        with _unlogged():
            blocks = build_blocks(detector_chain(detector), self.settings, self.task, make=DrivenBlock)
        return cast(list[DrivenBlock], blocks)

    def draw(self) -> None:
        """Draw the auxiliary networks' weights again: they are drawn after the detector's, which may have changed."""
        drawn = self._build(copy.deepcopy(self.module).cpu())
        for block, new in zip(self.blocks, drawn, strict=True):
            if block.auxiliary is not None and new.auxiliary is not None:
                block.auxiliary.load_state_dict(new.auxiliary.state_dict())

    def build_optim_wrapper(self, config: ConfigDict) -> BlockOptimWrappers:
        """One wrapper per block, ``block0`` and so on, each built by MMEngine from the same config."""
        wrappers = {}
        self.optim_config = config
        for block in self.blocks:
            wrapper = build_optim_wrapper(part_of(self.module, block), config)
            if wrapper.clip_grad_kwargs:
                wrapper.grad_name = f"block{block.index}/{wrapper.grad_name}"
            block.drive(wrapper)
            wrappers[f"block{block.index}"] = wrapper
        self.optim_wrapper = BlockOptimWrappers(**wrappers)
        return self.optim_wrapper

    def train_step(self, data: Any, optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        """Run a local step of every block on a batch from the data loader; return the losses to log, by name."""
        assert optim_wrapper is self.optim_wrapper, "blocks are driven by the wrappers made for them"
        batch = self.module.data_preprocessor(data, True)
        message = Message(
            {"x": batch["inputs"]}, targets_of(batch["data_samples"]), sequence=self.blocks[0].next_sequence
        )
        message = message.to(batch["inputs"].device)
        own: dict[str, Tensor] = {}
        with self._measured(message):
            for block in self.blocks:
                message, report = block.local_step(message)
                own[f"block{block.index}/loss"] = report.loss
                if report.skipped:
                    own[f"block{block.index}/skipped"] = torch.tensor(report.skipped)
        return {**self.task.named, **own}

    @contextmanager
    def _measured(self, message: Message) -> Iterator[None]:
        """A context that, if ``measuring``, counts the bytes of all tensors; each block's peak goes into ``peaks``."""
        with ExitStack() as stack:
            if self.measuring:
                tracker = MemoryTracker(message.x.device.type)
                tracker.add(message.tensors(), "activations")
                for block in self.blocks:
                    stack.enter_context(Followed(tracker, block, self.peaks))
                stack.enter_context(tracker)
            yield
        self.measuring = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def val_step(self, data: Any) -> Any:
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        return self.module.test_step(data)

    def local_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the detector's weights and MMEngine's own state, in plain containers."""
        return {
            "cut": [block.unit_names for block in self.blocks],
            "auxiliary": self.settings.local.auxiliary,
            "tensors": {name: tensor.cpu() for name, tensor in self._auxiliary_tensors().items()},
            "parameters": {f"block{block.index}": names_in_order(block) for block in self.blocks},
            "skipped": [block.skipped for block in self.blocks],
        }

    def load_local_state(self, state: Mapping[str, Any]) -> bool:
        """Restore ``local_state``; return False and change nothing if it has other blocks or auxiliary networks."""
        own, saved = self._auxiliary_tensors(), state.get("tensors", {})
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        before = Division(state.get("cut", []), state.get("auxiliary"), shapes)
        if before != Division.of(self.blocks, self.settings.local.auxiliary):
            return False
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        for block, skipped in zip(self.blocks, state["skipped"], strict=True):
            block.skipped = skipped
        return True

    def optimizer_before(self, state: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Optimizer state of the detector's own parameters, as ``name:key`` -> tensor, from a checkpoint of other
        training.

        Args:
            state: the ``local_state`` in that checkpoint; empty after end-to-end training.
            saved: the optimizer's state in the checkpoint.
        """
        if "parameters" in state:
            return optimizer_by_name(state["parameters"], saved)
        with _unlogged():
            names = names_end_to_end(self.module, self.optim_config, saved)
        return {} if names is None else optimizer_by_name({"": names}, {"": saved})

    def _auxiliary_tensors(self) -> dict[str, Tensor]:
        return {
            name: tensor.detach()
            for block in self.blocks
            for name, tensor in block.named_state().items()
            if name.startswith(AUXILIARY)
        }


@contextmanager
def _unlogged() -> Iterator[None]:
    """A context without MMEngine's log of how every tensor was initialised, which the detector itself has filled."""
    logger = MMLogger.get_current_instance()
    handlers, logger.handlers = logger.handlers, []
    try:
        yield
    finally:
        logger.handlers = handlers
