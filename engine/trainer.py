"""The training loop: steps, evaluation, checkpoints, a clean stop."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from engine.block import Block, Report
from engine.build import batch_norm_name, build_blocks, prepare
from engine.checkpoint import Position, find_checkpoint, load_checkpoint, save_checkpoint, set_aside
from engine.config import Config, save
from engine.device import choose_device, deterministic, resident_bytes
from engine.files import write_text
from engine.log import RunLog, block_table, console, progress_bar
from engine.message import Message
from engine.optimizer import rate_factor, set_rate
from engine.schedules import SCHEDULES
from engine.shapes import evaluating
from engine.task import Task


class Trainer:
    """Trains one task by one config and writes ``runs/NAME/``.

    Raises:
        ValueError: anything in the config that cannot work, before the run's folder is made.
    """

    def __init__(self, config: Config, task: Task) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"local.schedule: {config.local.schedule} runs in one process, torchrun started "
                f"{os.environ['WORLD_SIZE']}; use --nproc-per-node 1"
            )
        self.config, self.task = config, task
        self.device = choose_device(config.train.device)
        self.chain = task.build_chain()
        self.blocks = build_blocks(self.chain, config, task)
        _check_batch(self.blocks, task)
        self.steps_per_epoch = task.steps_per_epoch()
        if self.steps_per_epoch == 0:
            raise ValueError("data.batch: larger than the training set, and data.drop_last leaves nothing")
        prepare(self.blocks, config, self.device)
        self.schedule = SCHEDULES[config.local.schedule](self.blocks)
        self.position = Position(steps_per_epoch=self.steps_per_epoch)
        self.folder = run_folder(config)
        self._resume()
        self._pending: list[tuple[int, list[Report]]] = []
        self._stop = False
        self._started = time.monotonic()

    @property
    def last_step(self) -> int:
        """Optimizer steps of the whole run."""
        whole = self.config.train.epochs * self.steps_per_epoch
        return min(whole, self.config.train.steps) if self.config.train.steps else whole

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self._stop and self.position.step < self.last_step

    def fit(self) -> dict[str, Any]:
        """Train to the end, or to an interrupt; returns what ``summary.json`` holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.config, self.folder / "config.yaml")
        console.print(block_table(self.blocks))
        console.print(f"training on {self.device}, writing {self.folder}")
        if self.config.local.precision == "fp16" and self.device.type == "cpu":
            console.print("fp16 is very slow on a CPU; local.precision bf16 needs as little memory")
        if self.position.step >= self.last_step:
            console.print(
                f"step {self.position.step} is the last already: only evaluating; raise train.epochs to train on"
            )
        if self.config.optimizer.clip_norm:
            console.print(f"clipping each block's own gradient norm to {self.config.optimizer.clip_norm}")
        log, values = RunLog(self.folder, self.position.step), {}
        self._started = time.monotonic() - self.position.seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with self._stop_on_signal(), deterministic(self.config.train.deterministic, self.device):
                while self.position.step < self.last_step and not self._stop:
                    self._epoch(log)
                    done = self.position.step >= self.last_step
                    if not self._stop and (done or self.position.epoch % self.config.train.evaluate_every == 0):
                        values = self.evaluate()
                        log.write(self.position.step, {"epoch": self.position.epoch, **values})
                        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                        console.print(f"epoch {self.position.epoch}, step {self.position.step}: test {shown}")
                if not values and not self.interrupted:
                    values = self.evaluate()
        finally:
            log.close()
        if self.interrupted:
            console.print(f"stopped and saved at step {self.position.step}; go on with --train.resume auto")
        summary = self._summary(values, time.monotonic() - self._started)
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def evaluate(self) -> dict[str, float]:
        """The task's figures on its test data."""
        with evaluating([self.chain.model]):
            return self.task.evaluate(lambda message: self.schedule.predict(message.to(self.device)))

    def step(self, micro_batches: Sequence[Message]) -> list[Report]:
        """One optimizer step of every block; the reports' losses are the whole batch's."""
        rate = self.config.optimizer.lr * rate_factor(
            self.config.optimizer, self.position.step, self.steps_per_epoch, self.config.train.epochs
        )
        for block in self.blocks:
            assert block.optimizer is not None
            set_rate(block.optimizer, rate)
        samples, losses = sum(message.batch for message in micro_batches), []
        for number, message in enumerate(micro_batches):
            message = replace(message.to(self.device), sequence=self.position.sequence)
            update = number == len(micro_batches) - 1
            weight = message.batch / samples
            reports = self.schedule.step(message, update=update, weight=weight)
            losses.append([report.loss * weight for report in reports])
            self.position.sequence += 1
        self.position.step += 1
        self.position.step_in_epoch += 1
        whole = [torch.stack(parts).sum() for parts in zip(*losses, strict=True)]
        return [replace(report, loss=loss) for report, loss in zip(reports, whole, strict=True)]

    def _epoch(self, log: RunLog) -> None:
        """The rest of the current epoch, or as much as the cap on steps and an interrupt leave of it."""
        train, position, start = self.config.train, self.position, time.monotonic()
        with progress_bar() as bar:
            shown = bar.add_task(
                f"epoch {position.epoch + 1}/{train.epochs}",
                total=self.steps_per_epoch,
                completed=position.step_in_epoch,
            )
            for micro_batches in self.task.batches(position.epoch, position.step_in_epoch):
                self._pending.append((position.step + 1, self.step(micro_batches)))
                bar.advance(shown)
                ended = position.step_in_epoch == self.steps_per_epoch
                if ended:
                    position.epoch, position.step_in_epoch = position.epoch + 1, 0
                last = position.step >= self.last_step
                saving = ended or last or self._stop or (train.save_every and position.step % train.save_every == 0)
                if saving or position.step % train.log_every == 0:
                    self._write_losses(log, time.monotonic() - start)
                if saving:
                    self.save()
                if last or self._stop:
                    break

    def _write_losses(self, log: RunLog, seconds: float) -> None:
        """Log the newest step; refuse any loss since the last call that is not a number."""
        for step, reports in self._pending:
            losses = torch.stack([report.loss for report in reports]).tolist()
            for report, loss in zip(reports, losses, strict=True):
                if not math.isfinite(loss):
                    raise ValueError(self._remedy(f"block {report.block}: loss is {loss} at step {step}"))
        self._pending.clear()
        assert self.blocks[0].optimizer is not None
        values: dict[str, Any] = {"epoch": self.position.epoch, "train_loss": losses, "seconds": seconds}
        values["lr"] = self.blocks[0].optimizer.param_groups[0]["lr"]
        if self.config.optimizer.clip_norm:
            values["gradient_norm"] = [float(report.gradient_norm) for report in reports]
        if any(report.skipped for report in reports):
            values["skipped_updates"] = [report.skipped for report in reports]
        log.write(step, values)

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Raises:
            ValueError: something has stopped being finite; the checkpoints before are kept.
        """
        folder, auxiliary = self.folder / "checkpoints", self.config.local.auxiliary
        self.position.seconds = time.monotonic() - self._started
        try:
            return save_checkpoint(folder, self.blocks, self.position, auxiliary, self.config.train.keep)
        except ValueError as error:
            raise ValueError(self._remedy(str(error))) from error

    def _remedy(self, trouble: str) -> str:
        kept = find_checkpoint(self.folder / "checkpoints", console.print)
        return (
            f"{trouble}; lower optimizer.lr (now {self.config.optimizer.lr}) or set optimizer.clip_norm; "
            f"last good checkpoint: {kept or 'none'}"
        )

    def _resume(self) -> None:
        wish = self.config.train.resume
        if not wish:
            return
        path = find_checkpoint(self.folder / "checkpoints", console.print) if wish == "auto" else Path(wish)
        if path is not None and not path.is_dir():
            raise ValueError(f"train.resume: {path} is no checkpoint; give `auto` or a folder checkpoints/step_N")
        if path is None:
            console.print(f"train.resume: no checkpoint in {self.folder / 'checkpoints'}; starting at step 0")
            return
        self.position = load_checkpoint(path, self.blocks, self.config.local.auxiliary, console.print)
        if self.position.steps_per_epoch != self.steps_per_epoch:
            raise ValueError(
                f"train.resume: {path} has {self.position.steps_per_epoch} steps an epoch, this config "
                f"{self.steps_per_epoch}; keep data.batch, data.subset and data.drop_last as they were"
            )
        for name in set_aside(self.folder / "checkpoints", self.position.step):
            console.print(f"{name} is later than that and of another course: now superseded_{name}")
        console.print(f"resumed {path} at step {self.position.step}")

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step; a second SIGINT ends it at once."""

        def stop(number: int, frame: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _summary(self, values: dict[str, float], seconds: float) -> dict[str, Any]:
        local, cuda = self.config.local, self.device.type == "cuda"
        return {
            "task": self.task.name,
            "schedule": local.schedule,
            "blocks": len(self.blocks),
            "auxiliary": None if local.schedule == "end_to_end" else local.family,
            "world_size": 1,
            "steps": self.position.step,
            "metric": self.task.metric,
            "value": values.get(self.task.metric),
            **{name: value for name, value in values.items() if name != self.task.metric},
            "seconds": seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else resident_bytes()[1],
            "peak_memory_of": "CUDA tensors" if cuda else "resident set of the process",
            "skipped_updates": [block.skipped for block in self.blocks],
            "interrupted": self.interrupted,
        }


def run_folder(config: Config) -> Path:
    """Of ``root/name``, ``name-2``, ...: the first that is free for a new run, the last that is not to go on.

    A run goes on in its folder; one that starts from another run's checkpoint is new.
    """
    folder, resume = Path(config.output.root) / (config.output.name or config.task), config.train.resume
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    last, free = folder, folder
    while free.exists():
        last, free = free, next(numbered)
        if resume and last.resolve() in Path(resume).resolve().parents:
            return last
    return last if resume == "auto" else free


def _check_batch(blocks: Sequence[Block], task: Task) -> None:
    name = batch_norm_name(blocks) if task.smallest_batch() == 1 else None
    if name:
        raise ValueError(
            f"data.batch: the smallest micro-batch has 1 sample and BatchNorm {name!r} needs at least 2; "
            "choose another data.batch or train.accumulate, or data.drop_last true"
        )
