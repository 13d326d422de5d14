"""What local learning adds to MMEngine's log and checkpoints."""

from __future__ import annotations

from io import StringIO
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from engine.learning.build import remarks
from engine.run.log import block_table
from engine.utilities.size import MIB
from tasks.detection.wrapper import LocalModel

KEY = "local"
"""Key of the auxiliary networks in a checkpoint; MMEngine's tools read only the detector's own weights."""


@HOOKS.register_module()
class LocalHook(Hook):
    """Logs the blocks and their memory, and keeps auxiliary networks in checkpoints; ``LocalRunner`` registers it.

    Memory is measured once, in the second iteration that updates weights, since the first creates the optimizer's
    state. It is the peak of all tensors of the training step while each block's local step runs, on any device.
    """

    def __init__(self) -> None:
        self.updates = 0

    def before_train(self, runner: Runner) -> None:
        model = _local_model(runner)
        runner.logger.info(f"Training by local learning:\n{_text(block_table(model.blocks))}")
        for block in model.blocks:
            if block.span.frozen:
                names = ", ".join(block.span.frozen)
                runner.logger.info(f"{names}: frozen, so no block of its own; merged into block {block.index}")
        for line in remarks(model.blocks):
            runner.logger.info(line)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        model = _local_model(runner)
        assert model.optim_wrapper is not None
        self.updates += all(wrapper.should_sync() for wrapper in model.optim_wrapper.values())
        model.measuring = self.updates == 2 and not model.peaks

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = _local_model(runner)
        if self.updates != 2 or not model.peaks:
            return
        self.updates += 1
        table = Table(title="Peak memory of each block's local step")
        for name in ("block", "peak [MiB]", "of it, auxiliary networks [MiB]"):
            table.add_column(name, justify="right")
        for index, moment in sorted(model.peaks.items()):
            table.add_row(str(index), *(f"{size / MIB:.1f}" for size in (moment.bytes, moment.live["auxiliary"])))
        sizes = {f"block{index}/peak_bytes": moment.bytes for index, moment in model.peaks.items()}
        runner.visualizer.add_scalars(sizes, step=runner.iter + 1)
        runner.logger.info(f"Tensors alive:\n{_text(table)}")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if isinstance(runner.model, LocalModel):
            checkpoint[KEY] = runner.model.local_state()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restore the blocks' own state; of weights to start from (``load_from``) only the detector's are used."""
        model = runner.model
        if not isinstance(model, LocalModel) or not runner._resume:
            return
        state = checkpoint.pop(KEY, {})
        for block in model.blocks:
            block.next_sequence = checkpoint["meta"]["iter"]
        if model.load_local_state(state):
            return
        checkpoint.pop("param_schedulers", None)
        runner.optimizer_before = model.optimizer_before(state, checkpoint.pop("optimizer", {}))
        runner.logger.warning(
            "The checkpoint has other blocks or auxiliary networks: the detector goes on, auxiliary networks and "
            f"{'their' if runner.optimizer_before else 'all'} optimizer state start fresh"
        )


def _local_model(runner: Runner) -> LocalModel:
    assert isinstance(runner.model, LocalModel)
    return runner.model


def _text(table: Table) -> str:
    page = StringIO()
    Console(file=page, width=100).print(table)
    return page.getvalue().rstrip()
