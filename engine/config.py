"""Typed configuration: dataclasses read from YAML and dotted overrides, every error one line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import yaml

from engine.utilities.console import console
from engine.utilities.files import write_text
from engine.utilities.text import did_you_mean, one_line

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


Recompute = Literal["none", "units"]
"""What of a block's activations backward recomputes."""


@dataclass
class LocalConfig:
    """How the network is cut and trained."""

    blocks: int = 4
    """Number of blocks; more blocks need less memory and cost some accuracy."""
    cut: list[str] = field(default_factory=list)
    """Names of the units that start a block (the first block's left out); replaces `blocks` and `balance`."""
    balance: Literal["units", "parameters"] | list[float] = "units"
    """What `blocks` evens out: units, parameters, or one weight per unit."""
    auxiliary: str | dict[str, Any] = "glcan"
    """Auxiliary network: a name, or a mapping with `type` and its options."""
    schedule: str = "sequential"
    """Order in which blocks run: `sequential`, one after another; `streams`, on streams of one GPU; `pipeline`, on the
    ranks that torchrun starts (several ranks turn `sequential` into it). The result is the same. `end_to_end`:
    ordinary backpropagation, as one block."""
    recompute: Recompute = "none"
    """Activation checkpointing: `units` runs the forward pass of each of a block's units, except the last, again in
    backward instead of keeping its activations. Less memory, more time, same result."""
    offload: bool = False
    """Keep what backward needs in main memory instead of on the GPU. Less GPU memory, more time, same result."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of forward and loss; fp16 scales each block's loss on its own."""
    compile: bool = False
    """Compile each block with torch.compile; the first step takes longer."""

    @property
    def end_to_end(self) -> bool:
        """Whether the whole network is one block, trained by ordinary backpropagation."""
        return self.schedule == "end_to_end"

    @property
    def family(self) -> str:
        """The auxiliary network's name, without its options."""
        return self.auxiliary if isinstance(self.auxiliary, str) else str(self.auxiliary.get("type"))


@dataclass
class OptimizerConfig:
    """One optimizer per block, all alike."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD; AdamW's first beta."""
    nesterov: bool = True
    """Nesterov's form of momentum (SGD only)."""
    weight_decay: float = 1e-4
    """L2 decay of SGD, decoupled decay of AdamW; on every parameter."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Course of the learning rate after warm-up: to 0 by a half cosine, or times `gamma` at `milestones`."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises linearly to `lr`."""
    milestones: list[int] = field(default_factory=list)
    """Epochs at which `schedule: step` lowers the rate."""
    gamma: float = 0.1
    """Factor at each milestone."""
    clip_norm: float = 0.0
    """Largest gradient norm of each block (not of the whole network); 0 does not clip."""


@dataclass
class TrainConfig:
    """Length, seed and book-keeping of a run."""

    epochs: int = 10
    """Passes over the training data; fixes the learning-rate course."""
    steps: int = 0
    """Cap on optimizer steps, for short trials; 0 is no cap."""
    seed: int = 0
    """Fixes weights, data order, augmentation and dropout."""
    accumulate: int = 1
    """Micro-batches per optimizer step; each holds `data.batch` / `accumulate` samples."""
    resume: str = ""
    """`auto` goes on from the newest complete checkpoint of this run's folder; a folder, from that one."""
    save_every: int = 0
    """Optimizer steps between checkpoints, beside one per epoch; 0 saves per epoch only."""
    keep: int = 2
    """Newest checkpoints kept; at least 2, so that a damaged one leaves another."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 10
    """Optimizer steps between lines of metrics."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; or `cpu`, `cuda`, `cuda:1`."""
    deterministic: bool = True
    """Choose algorithms that give the same bits on every run; costs some speed on a GPU."""


@dataclass
class PlacementConfig:
    """Which rank has which block when torchrun starts several: stages of the pipeline x replicas."""

    stages: list[int] = field(default_factory=list)
    """Stage of each block, as [0, 0, 1, 1]; empty: blocks are timed and balanced when training starts."""
    memory: str = ""
    """Budget for the tensors of a rank (4GiB), which a balance by time must keep; empty sets none."""
    replicas: int = 1
    """Ranks that share each stage's blocks; every replica trains on its part of a batch."""
    replication: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """What replicas share: nothing (ddp), all state (fsdp, zero3), optimizer state (zero1), gradients too (zero2)."""
    offload_optimizer: bool = False
    """Keep optimizer state and updates of `zero1` to `zero3` in main memory. Less GPU memory, more time."""
    sync_batch_norm: bool = True
    """BatchNorm takes its statistics over all replicas' samples; else over each replica's own."""
    depth: int = 2
    """Messages that may wait at either end of a link; more hide slower links and take more memory."""
    timeout: float = 300.0
    """Seconds without a sign of a neighbouring rank after which the job ends."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What carries tensors: NCCL between GPUs, gloo through main memory; `auto` takes NCCL if each rank has a GPU."""


@dataclass
class OutputConfig:
    """Where a run writes."""

    root: str = "runs"
    """Folder of all runs."""
    name: str = ""
    """This run's folder in it; empty: the config file's name."""


@dataclass
class Config:
    """What every task's config has; a task adds `model` and `data`."""

    task: str = ""
    """Folder under tasks/: classification, style_transfer/scin, ..."""
    local: LocalConfig = field(default_factory=LocalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: naming the key, its value and what it may be.
        """
        train, optimizer = self.train, self.optimizer
        at_least(
            ("train.epochs", train.epochs, 1),
            ("train.steps", train.steps, 0),
            ("train.accumulate", train.accumulate, 1),
            ("train.save_every", train.save_every, 0),
            ("train.keep", train.keep, 2),
            ("train.evaluate_every", train.evaluate_every, 1),
            ("train.log_every", train.log_every, 1),
            ("local.blocks", self.local.blocks, 1),
            ("optimizer.clip_norm", optimizer.clip_norm, 0),
            ("optimizer.warmup_epochs", optimizer.warmup_epochs, 0),
            ("placement.replicas", self.placement.replicas, 1),
            ("placement.depth", self.placement.depth, 2),
            ("placement.timeout", self.placement.timeout, 1),
        )
        if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum <= 0:
            raise ValueError("optimizer.nesterov: needs optimizer.momentum above 0; set optimizer.nesterov false")
        chosen = {
            "compile": self.local.compile,
            "recompute": self.local.recompute != "none",
            "offload": self.local.offload,
        }
        special = [key for key, wanted in chosen.items() if wanted]
        if len(special) > 1:
            raise ValueError(f"local.{special[0]}: cannot be combined with local.{special[1]}; take one of them")
        placement = self.placement
        if placement.replicas == 1 and (placement.replication != "ddp" or placement.offload_optimizer):
            key = "offload_optimizer" if placement.replication == "ddp" else "replication"
            raise ValueError(f"placement.{key}: shares a block among replicas; set placement.replicas to 2 or more")
        if placement.memory and placement.stages:
            raise ValueError("placement.memory: has no say where placement.stages is given; leave one of them out")
        if optimizer.lr <= 0:
            raise ValueError(f"optimizer.lr: {optimizer.lr} must be above 0")
        if optimizer.schedule == "step" and not optimizer.milestones:
            raise ValueError("optimizer.milestones: empty; schedule `step` needs at least one epoch")


def at_least(*checks: tuple[str, float, float]) -> None:
    """Refuse, by its key, the first (key, value, least) whose value is below the least."""
    for key, value, least in checks:
        if value < least:
            raise ValueError(f"{key}: {value} is too small; the least is {least}")


AnyConfig = TypeVar("AnyConfig", bound=Config)


def words(argv: Sequence[str]) -> list[str]:
    """Command-line words with every ``--key=value`` taken apart."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]


def config_file(argv: Sequence[str]) -> Path | None:
    """The file that ``--config`` names, the last one if there are several."""
    files = [value for key, value in pairwise(words(argv)) if key == "--config"]
    return Path(files[-1]) if files else None


def task_name(argv: Sequence[str]) -> str:
    """The task that the overrides in ``argv`` or else the config file name."""
    named = [value for key, value in pairwise(words(argv)) if key == "--task"]
    if named:
        return named[-1]
    file = config_file(argv)
    if file is None:
        raise ValueError("--config: no file given; tasks/*/configs/ and tasks/*/*/configs/ have them")
    return str(read_yaml(file).get("task", ""))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: no such file, or not a mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a config is a mapping of sections, this is {type(content).__name__}")
    return content


def parse(config_class: type[AnyConfig], argv: Sequence[str], program: str = "tools/train.py") -> AnyConfig:
    """Read ``--config FILE`` and ``--section.key value`` overrides into ``config_class``.

    Raises:
        ValueError: unknown key (with the nearest known one), wrong type, or a refused value.
    """
    argv = _renamed_words(words(argv))
    known, sections = keys(config_class), typing.get_type_hints(config_class)
    file, auxiliary = config_file(argv), LocalConfig.auxiliary
    if file is not None:
        content = read_yaml(file)
        if renamed_keys(content.get("local")):
            at = max(number for number, word in enumerate(argv) if word == "--config")
            argv[at + 1] = yaml.safe_dump(content)
        _check_keys(_flat(content), known, f"{file}: ")
        for name, value in content.items():
            if dataclasses.is_dataclass(sections.get(name)) and not isinstance(value, dict):
                raise ValueError(f"{file}: {name}: a section is a mapping of keys, this is {type(value).__name__}")
        auxiliary = (content.get("local") or {}).get("auxiliary", auxiliary)
    auxiliary = next((value for key, value in reversed(list(pairwise(argv))) if key == "--local.auxiliary"), auxiliary)
    _check_keys(
        [word[2:].rstrip("+") for word in argv if word.startswith("--")], {*known, "config", "help", "print_config"}, ""
    )
    parser = jsonargparse.ArgumentParser(
        prog=program, exit_on_error=False, description=(config_class.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", action="config", help="YAML file with the sections below")
    parser.add_class_arguments(config_class)
    try:
        values = vars(parser.instantiate(parser.parse_args(argv)))
        config = config_class(**{name: value for name, value in values.items() if name != "config"})
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(parser_message(error)) from error
    chosen = config.local.auxiliary
    if isinstance(chosen, dict):
        chosen = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in chosen.items()}
        if "type" not in chosen and isinstance(auxiliary, str):
            chosen = {"type": auxiliary, **chosen}  # --local.auxiliary.option on top of a mere name
        config.local.auxiliary = chosen
    elif any(word.startswith("--local.auxiliary.") for word in argv):
        raise ValueError(
            f"local.auxiliary: options come after the name: --local.auxiliary {chosen} --local.auxiliary.KEY"
        )
    config.check()
    return config


def keys(config_class: type[Any], prefix: str = "") -> set[str]:
    """Dotted names of all sections and keys."""
    found: set[str] = set()
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        found.add(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            found |= keys(hints[item.name], f"{prefix}{item.name}.")
    return found


def to_yaml(config: Config) -> str:
    """The complete, resolved config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save(config: Config, path: Path) -> None:
    """Write the complete, resolved config."""
    write_text(path, to_yaml(config))


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in content.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict) and not prefix:
            names += _flat(value, f"{key}.")
    return names


def _check_keys(names: Sequence[str], known: set[str], where: str) -> None:
    for name in names:
        if name in known or name.startswith("local.auxiliary."):
            continue
        raise ValueError(f"{where}unknown key {name!r}{did_you_mean(name, known)}")


def parser_message(error: Exception) -> str:
    """What jsonargparse has to say, in one line that begins with the key."""
    text = re.sub(r"^Parser key \"?([\w.]+)\"?:", r"\1:", str(error).strip())
    return one_line(text.replace("<class '", "").replace("'>", ""))


RECOMPUTE = {"true": "units", "false": "none"}
"""What ``local.recompute`` is for each value of ``local.checkpoint``, the old name of that key."""


def renamed_keys(local: Any) -> bool:
    """Give keys of a ``local`` section that have another name now their new name; whether there was one.

    Raises:
        ValueError: the old key has a value that it could not have.
    """
    if not isinstance(local, dict) or "checkpoint" not in local:
        return False
    local["recompute"] = _recompute(str(local.pop("checkpoint")).lower())
    return True


def _renamed_words(argv: Sequence[str]) -> list[str]:
    new = list(argv)
    for at, word in enumerate(argv[:-1]):
        if word == "--local.checkpoint":
            new[at : at + 2] = ["--local.recompute", _recompute(argv[at + 1].lower())]
    return new


def _recompute(value: str) -> str:
    if value not in RECOMPUTE:
        raise ValueError(f"local.checkpoint: {value!r} is neither true nor false; the key is now local.recompute")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        console.print(
            f"local.checkpoint {value} is now local.recompute {RECOMPUTE[value]}; the old key will be removed"
        )
    return RECOMPUTE[value]
