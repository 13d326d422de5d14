"""The training loop: steps, evaluation, checkpoints, a clean stop."""

from __future__ import annotations

import json
import math
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.config import Config, PlacementConfig, save
from engine.distributed.account import PAGE, TIMELINE, RankAccount, report_ranks, stage_lines
from engine.distributed.meet import join
from engine.distributed.order import Order
from engine.distributed.pipeline import Pipeline
from engine.distributed.placement import place
from engine.distributed.replication import prepare_replicas
from engine.distributed.transport import LinkError
from engine.distributed.world import World
from engine.learning.block import Block
from engine.learning.blocks import Blocks
from engine.learning.build import batch_norm_name, build_blocks, check_example, keep_only, prepare, remarks
from engine.learning.optimizer import rate_factor, set_rate
from engine.learning.schedules import find_schedule
from engine.network.shapes import evaluating
from engine.run.checkpoint import Position, clean, newest_checkpoint, set_aside
from engine.run.course import Course
from engine.run.folder import JOB, claim, find_start, run_folder
from engine.run.log import Pace, Progress, RunLog, block_table, is_scored
from engine.run.losses import Losses
from engine.run.resume import Saved
from engine.run.save import Checkpoint, CheckpointWriter, infinite_buffers
from engine.run.summary import summarise
from engine.task import Metrics, Task, check_metric
from engine.utilities.console import console
from engine.utilities.device import deterministic, reset_peak, resident_bytes
from engine.utilities.files import WriteError, write_text
from engine.utilities.recorder import Recorder, recording


class Trainer:
    """Trains one task with one config, and writes ``runs/NAME/``. With several ranks, each of them has a trainer.

    All ranks follow the same orders (see ``engine.distributed.order``). The first stage issues them: it reads the data
    and receives signals. The main rank, in the last stage, logs, evaluates and prints.

    Args:
        world: the ranks of the job; by default, the trainer joins the ranks that torchrun started.

    Raises:
        ValueError: the config asks for something that cannot work. This happens before the run's folder is made.
    """

    def __init__(self, config: Config, task: Task, world: World | None = None) -> None:
        self.config, self.task = config, task
        self.world = world = world or join(config.placement, config.train.device)
        self.device = world.device
        make_schedule = find_schedule(config.local.schedule)  # an unknown name is refused before any weights are read
        with world.one_of_a_host_first():
            self.chain = task.build_chain()
            check_example(self.chain, task)
            self.all_blocks = build_blocks(self.chain, config, task)
            _check_batch(self.all_blocks, task, config.placement)
            self.steps_per_epoch = task.steps_per_epoch()
        if self.steps_per_epoch == 0:
            raise ValueError("data.batch: larger than the training set, and data.drop_last leaves nothing")
        # Only the main rank chooses: the others would find its new folder in use.
        self.folder = world.from_main(run_folder(config, world.job) if world.main else Path())
        self._new = not self.folder.exists()  # another job may make it before this one does (see ``claim``)
        self._made = False
        saved = self._saved()
        shared = self.chain.shared.name if self.chain.shared else ""
        self.placement = place(config, task, world, len(self.all_blocks), shared)
        own = (self.all_blocks[index] for index in self.placement.blocks_of(world.stage))
        self.blocks = Blocks(own, self.all_blocks.encoder)
        # Every rank builds the whole network, so that weights and shapes are those of one process, then drops the
        # blocks of other ranks before anything moves to the device.
        if world.stages > 1:
            keep_only(self.blocks, self.all_blocks)
        if world.stage_group is None:
            prepare(self.blocks, config, self.device)
        else:
            prepare_replicas(self.blocks, config, self.device, world.stage_group)
        for block in self.blocks.learners:
            block.infinite = infinite_buffers(block)
        self.recorder = Recorder(world.rank, self.device) if world.size > 1 else None
        schedule = make_schedule(self.blocks, self.recorder)
        depth = config.placement.depth
        self.pipeline = Pipeline(schedule, world.inbox(depth), world.outbox(depth))
        self.position = Position(steps_per_epoch=self.steps_per_epoch)
        self.writer = CheckpointWriter(writes=world.replica == 0, commits=world.main, timeout=config.placement.timeout)
        if saved is not None:
            self._resume(saved)
        unscored = world.from_main(saved is not None and world.main and not is_scored(saved.path, self.position))
        self.course = Course(config.train, task, world, self.position, self.last_step, unscored=unscored)
        self._first_step = self.position.step
        self._losses, self._pace = Losses(), Pace()
        self._metrics: Metrics | None = None
        self._evaluation_mode: ExitStack | None = None
        self._values: dict[str, float] = {}
        self._started = self._epoch_started = time.monotonic()
        self._timed_epoch = -1

    @property
    def last_step(self) -> int:
        """Number of optimizer steps in the whole run."""
        whole = self.config.train.epochs * self.steps_per_epoch
        return min(whole, self.config.train.steps) if self.config.train.steps else whole

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return not self.course.finished

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until a signal interrupts the run.

        Returns:
            The content of ``summary.json``. On ranks other than the main one, it has no figures of an evaluation.

        Raises:
            ValueError: a loss or some state stopped being finite, or a checkpoint could not be written.
            BlockError: a block failed.
            LinkError: a neighbouring rank failed or gave no sign of life.
        """
        try:
            self._begin()
            with RunLog(self.folder, self.position.step) if self.world.main else nullcontext() as log:
                self._started = time.monotonic() - self.position.seconds
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                reset_peak()
                self._pace.start()
                with self.course.stopped_by_signals(), deterministic(self.config.train.deterministic, self.device):
                    with Progress(self.config.train.epochs, self.steps_per_epoch, shown=self.world.main) as progress:
                        for order in self.pipeline.orders(self.course.orders()):
                            self._follow(order, log, progress)
                    self.writer.wait()
                    self.pipeline.close()
            return self._finish()
        except Exception as error:
            if isinstance(error, LinkError):
                error.args = (f"{error}; this rank is at step {self.position.step}",)
            if isinstance(error, WriteError):
                self.writer.hurry()
                with suppress(Exception):
                    self.writer.wait()  # the checkpoint that is being written may be the last good one
                error.args = (f"{error}; make room or choose another output.root; {self._kept}",)
            # Tell before waiting for the writer: other ranks fail in the meantime, and the first to tell is printed.
            self.world.tell(error)
            self.writer.hurry()
            with suppress(Exception):  # the first error is the one to raise
                self.writer.wait()
            with suppress(Exception):
                self._leave_nothing_half(error)
            raise

    def _leave_nothing_half(self, error: Exception) -> None:
        """After an error, remove a checkpoint that is not complete.

        A start that a user's error ended before the first step leaves no folder, so the next one gets the same name.
        """
        if self.world.main:
            clean(self.folder / "checkpoints")
        started = self.position.step > self._first_step or newest_checkpoint(self.folder / "checkpoints")
        if self._made and not started and isinstance(error, ValueError):
            shutil.rmtree(self.folder)

    def _finish(self) -> dict[str, Any]:
        """Write ``summary.json`` and the report of the ranks; return the summary."""
        seconds = time.monotonic() - self._started
        ranks = self.world.gather(self._account())
        summary = summarise(
            self.config,
            self.task,
            ranks,
            self._values,
            blocks=len(self.all_blocks),
            step=self.position.step,
            seconds=seconds,
            interrupted=self.interrupted,
            cuda=self.device.type == "cuda",
        )
        if self.world.main:
            write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            if self.interrupted:
                console.print(f"stopped and saved at step {self.position.step}; go on with --train.resume auto")
            if len(ranks) > 1:
                report_ranks(self.folder, ranks, self.placement)
        return summary

    def _begin(self) -> None:
        """Make the run's folder, print what the run will do, and check that every rank sees the folder.

        Raises:
            ValueError: a rank does not see the folder of the main rank.
        """
        local = self.config.local
        if self.world.main and self._new:
            self.folder, self._made = claim(self.folder, self.config), True
        folder = self.folder = self.world.from_main(self.folder)
        if self.world.main:
            clean(folder / "checkpoints")
            for name in (TIMELINE, PAGE):  # a resumed run may have other ranks, or only one
                (folder / name).unlink(missing_ok=True)
            save(self.config, folder / "config.yaml")
            if self.world.job:
                write_text(folder / JOB, self.world.job)
            console.print(block_table(self.all_blocks.learners, self.placement.bounds))
            for block in self.all_blocks:
                if block.span.frozen:
                    names = ", ".join(block.span.frozen)
                    console.print(f"{names}: frozen, so no block of its own; merged into block {block.index}")
            for line in remarks(self.all_blocks):
                console.print(line)
            where = f"{self.world.size} ranks" if self.world.size > 1 else str(self.device)
            for line in stage_lines(self.placement) if self.world.stages > 1 else ():
                console.print(line)
            console.print(f"training on {where}, writing {folder}")
            if local.precision == "fp16" and self.device.type == "cpu":
                console.print("fp16 is very slow on a CPU; local.precision bf16 needs as little memory")
            if self.course.finished:
                console.print(
                    f"step {self.position.step} is the last already: only evaluating; raise train.epochs to train on"
                )
            if self.config.optimizer.clip_norm:
                console.print(f"clipping each block's own gradient norm to {self.config.optimizer.clip_norm}")
        self.world.gather(None)  # a barrier: the main rank has made the folder
        if not (folder / "config.yaml").is_file():
            raise ValueError(
                f"output.root: {folder.resolve()} of the main rank is not there on rank {self.world.rank}; choose a "
                "folder that all hosts share"
            )

    def _follow(self, order: Order, log: RunLog | None, progress: Progress) -> None:
        """Carry out an order: run the blocks and send the order on, then do this rank's own part."""
        if order.kind == "train":
            if self.position.epoch != self._timed_epoch:  # before the epoch's first step, which counts too
                self._timed_epoch, self._epoch_started = self.position.epoch, time.monotonic()
            self._set_rate()
        elif order.kind == "evaluate":
            self._evaluate_from_here()
        result, prediction = self.pipeline.run(order)
        if order.kind == "train":
            self._trained(result, log, progress)
        elif order.kind == "save":
            self._write_losses(log, progress)
            self.save()
            self._pace.start()
        elif order.kind == "evaluate" and self.world.main:
            assert order.message is not None
            self._metrics = self._metrics or self.task.metrics()
            self._metrics.update(prediction, order.message.targets)
        elif order.kind == "score":
            self._score(log)
            self._pace.start()

    def _evaluate_from_here(self) -> None:
        """Put the network into evaluation mode, with whole parameters, until the order to score.

        This happens once per evaluation, not per message: gathering sharded parameters is a collective call.
        """
        if self._evaluation_mode is None:
            self._evaluation_mode = ExitStack()
            self._evaluation_mode.enter_context(evaluating([self.chain.model]))
            for block in self.blocks:
                self._evaluation_mode.enter_context(block.gathered())

    def _score(self, log: RunLog | None) -> None:
        assert self._evaluation_mode is not None, "nothing was evaluated"
        self._evaluation_mode.close()
        self._evaluation_mode = None
        if log is None:
            return
        assert self._metrics is not None
        self._metrics.save(self.folder / "evaluation" / f"step_{self.position.step}")
        self._values, self._metrics = self._metrics.compute(), None
        check_metric(self.task, self._values)
        log.write(self.position.step, {"epoch": self.position.epoch, **self._values})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self._values.items())
        console.print(f"epoch {self.position.epoch}, step {self.position.step}: test {shown}")

    def _set_rate(self) -> None:
        rate = self.config.optimizer.lr * rate_factor(
            self.config.optimizer, self.position.step, self.steps_per_epoch, self.config.train.epochs
        )
        for block in self.blocks.learners:
            assert block.optimizer is not None
            set_rate(block.optimizer, rate)

    def _trained(self, order: Order, log: RunLog | None, progress: Progress) -> None:
        """Count a micro-batch. After the last one of a step, close the step and collect the losses of its batch."""
        position = self.position
        position.sequence += 1
        if self.pipeline.outbox is None:
            self._losses.add(order, order.weight / self.world.replicas)  # the weight counts the replicas, a share not
        if not order.update:
            return
        self.writer.check()
        position.step += 1
        position.step_in_epoch += 1
        if self.pipeline.outbox is None:
            self._losses.end_step(position.step)
            assert order.message is not None
            # The weight is the micro-batch's share of the batch, times the number of replicas.
            self._pace.step(round(order.message.batch * self.world.replicas / order.weight))
        progress.show(position.epoch, position.step_in_epoch)
        if position.step_in_epoch == self.steps_per_epoch:
            position.epoch, position.step_in_epoch = position.epoch + 1, 0
        if position.step % self.config.train.log_every == 0:
            self._write_losses(log, progress)

    def _write_losses(self, log: RunLog | None, progress: Progress) -> None:
        """Log the newest step, and check all losses since the last call. Only the last stage has any.

        Raises:
            ValueError: a loss is not finite.
        """
        if not self._losses:
            return
        self.pipeline.schedule.settle()  # the losses are on the blocks' streams
        steps, own, reports = self._losses.take()
        losses = self.world.add_over_replicas(own).tolist()
        for step, of_step in zip(steps, losses, strict=True):
            for report, loss in zip(reports, of_step, strict=True):
                if not math.isfinite(loss):
                    raise ValueError(self._remedy(f"block {report.block}: loss is {loss} at step {step}"))
        if log is None:
            return
        assert self.blocks[0].optimizer is not None
        values: dict[str, Any] = {"epoch": self.position.epoch, "train_loss": losses[-1]}
        values["seconds"] = time.monotonic() - self._epoch_started
        values["samples_per_second"], step_seconds = self._pace.take()
        values["peak_memory_bytes"] = self._peak_bytes
        values["lr"] = self.blocks[0].optimizer.param_groups[0]["lr"]
        if self.config.optimizer.clip_norm:
            values["gradient_norm"] = [float(report.gradient_norm) for report in reports]
        if any(report.skipped for report in reports):
            values["skipped_updates"] = [report.skipped for report in reports]
        log.write(steps[-1], values)
        progress.line(steps[-1], self.last_step, values, step_seconds)

    def save(self) -> None:
        """Copy the current state and have it written as a checkpoint while training goes on.

        Raises:
            ValueError: a parameter, a buffer or optimizer state is not finite. Earlier checkpoints are kept.
        """
        self.position.seconds = time.monotonic() - self._started
        checkpoint = Checkpoint(
            self.folder / "checkpoints",
            replace(self.position),  # a copy, because training advances the original
            len(self.all_blocks.learners),
            self.config.local.auxiliary,
            self.blocks[0].optimizer_name,
            self.config.train.keep,
        )
        self.pipeline.schedule.settle()
        try:
            with recording(self.recorder, -1, "save", -1):
                self.writer.save(checkpoint, self.blocks.learners)
        except WriteError:
            raise
        except ValueError as error:
            raise ValueError(self._remedy(str(error))) from error

    def _remedy(self, trouble: str) -> str:
        """The error message for ``trouble``, with what to change and the last good checkpoint."""
        self.writer.wait()  # the checkpoint that is being written may be the last good one
        return (
            f"{trouble}; lower optimizer.lr (now {self.config.optimizer.lr}) or set optimizer.clip_norm; {self._kept}"
        )

    @property
    def _kept(self) -> str:
        return f"last good checkpoint: {newest_checkpoint(self.folder / 'checkpoints') or 'none'}"

    def _saved(self) -> Saved | None:
        """The checkpoint to resume from, or None. The main rank finds and verifies it, and every rank opens it.

        Raises:
            ValueError: the checkpoint does not suit this config.
        """
        world, log = self.world, console.print if self.world.main else _silent
        found = world.from_main(find_start(self.config, self.folder, world.job) if world.main else None)
        if found is None:
            return None
        saved = Saved(found, self.all_blocks.learners, self.config.local.auxiliary, log, verify=False)
        if saved.position.steps_per_epoch != self.steps_per_epoch:
            raise ValueError(
                f"train.resume: {found} has {saved.position.steps_per_epoch} steps an epoch, this config "
                f"{self.steps_per_epoch}; keep data.batch, data.subset and data.drop_last as they were"
            )
        return saved

    def _resume(self, saved: Saved) -> None:
        saved.load(self.blocks.learners)
        self.position = saved.position
        self.world.gather(None)  # a barrier: all ranks have read the checkpoint before any is renamed
        if self.world.main:
            for name in set_aside(self.folder / "checkpoints", self.position.step):
                console.print(f"{name} is later than the checkpoint resumed from; renamed to superseded_{name}")
            console.print(f"resumed {saved.path} at step {self.position.step}")

    @property
    def _peak_bytes(self) -> int:
        """The peak so far: of tensors on a GPU, otherwise of the resident set."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident_bytes()[1]

    def _account(self) -> RankAccount:
        outbox = self.pipeline.outbox
        return RankAccount(
            rank=self.world.rank,
            stage=self.world.stage,
            replica=self.world.replica,
            host=socket.gethostname(),
            steps=self.position.step - self._first_step,
            blocks=[block.index for block in self.blocks],
            peak_bytes=self._peak_bytes,
            sent_bytes=outbox.train_bytes if outbox else 0,
            skipped=[block.skipped for block in self.blocks],
            entries=self.recorder.entries if self.recorder else [],
        )


def _check_batch(blocks: Sequence[Block], task: Task, placement: PlacementConfig) -> None:
    """Check that every replica gets samples of every micro-batch, and enough of them for BatchNorm.

    Raises:
        ValueError: the smallest micro-batch is too small.
    """
    samples, replicas = task.smallest_batch(), placement.replicas
    if samples < replicas:
        raise ValueError(
            f"placement.replicas: the smallest micro-batch has {samples} samples for {replicas} replicas; choose "
            "another data.batch or train.accumulate, or data.drop_last true"
        )
    seen = samples if placement.sync_batch_norm else samples // replicas
    name = batch_norm_name(blocks) if seen == 1 and not task.single_sample else None
    if name:
        raise ValueError(
            f"data.batch: the smallest micro-batch has 1 sample and BatchNorm {name!r} needs at least 2; "
            "choose another data.batch or train.accumulate, or data.drop_last true"
        )


def _silent(text: str) -> None:
    """Print nothing: only the main rank prints."""
