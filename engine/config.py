"""Typed configuration: dataclasses read from YAML and dotted overrides; every error is one line.

The docstring below each field states the option's effect. ``tools/train.py --help`` prints these docstrings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import yaml

from engine.utilities.console import console, first_of_host
from engine.utilities.files import write_text
from engine.utilities.kinds import takes_none
from engine.utilities.options import check_keys, colon_hint, flat, hints, joined, loaded, parser_message, words
from engine.utilities.text import nearest, one_line

# A process-wide switch: without it, --help ignores the docstrings below the fields. jsonargparse has no setting per
# parser.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


Recompute = Literal["none", "units"]
"""Which activations of a block backward recomputes: none, or those of every unit except the last."""


@dataclass
class LocalConfig:
    """How the network is cut and trained."""

    blocks: int = 4
    """Number of blocks; more blocks need less memory and cost some accuracy."""
    cut: list[str] = field(default_factory=list)
    """Name of the first unit of every block except the first; replaces `blocks` and `balance`."""
    balance: Literal["units", "parameters"] | list[float] = "units"
    """What the cut into `blocks` makes even: the number of units, the number of parameters, or the sum of the given
    weights, one per unit."""
    auxiliary: str | dict[str, Any] = "glcan"
    """Auxiliary network that gives each block its local loss: a name, or a mapping with `type` and its options."""
    schedule: str = "sequential"
    """Order in which blocks run: `sequential` runs them one after another, `streams` overlaps them on one GPU, and
    `pipeline` spreads them over the ranks that torchrun starts (so does `sequential` when there are several ranks);
    the result is the same. `end_to_end` trains the whole network as one block by ordinary backpropagation."""
    recompute: Recompute = "none"
    """Activation checkpointing: `units` keeps no activations of a block's units, except the last, and recomputes them
    in backward. This takes less memory and more time; the result is the same."""
    offload: bool = False
    """Keep the tensors that backward needs in main memory instead of on the GPU. This takes less GPU memory and more
    time; the result is the same."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of forward and loss; with fp16, each block scales its loss by a factor of its own."""
    compile: bool = False
    """Compile each block with torch.compile; the first step then takes longer."""

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
    """The optimizer; every block has one of its own, with the same settings."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Algorithm: SGD with momentum, or AdamW."""
    lr: float = 0.1
    """Peak learning rate, reached at the end of warm-up."""
    momentum: float = 0.9
    """Momentum of SGD, or the first beta of AdamW."""
    nesterov: bool = True
    """Use Nesterov momentum; AdamW ignores it."""
    weight_decay: float = 1e-4
    """L2 penalty for SGD, decoupled decay for AdamW; applies to every parameter."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate after warm-up: `cosine` lowers it to 0 along a half cosine, `step` multiplies it by `gamma` at each
    of the `milestones`, `constant` keeps it."""
    warmup_epochs: float = 0.0
    """Number of epochs over which the learning rate rises linearly to `lr`."""
    milestones: list[int] = field(default_factory=list)
    """Epochs at which `schedule: step` multiplies the learning rate by `gamma`."""
    gamma: float = 0.1
    """Factor by which `schedule: step` multiplies the learning rate at each milestone."""
    clip_norm: float = 0.0
    """Largest gradient norm of each block, not of the whole network; 0 turns clipping off."""


@dataclass
class TrainConfig:
    """Length, seed and book-keeping of a run."""

    epochs: int = 10
    """Passes over the training data; the learning-rate schedule spans this many epochs."""
    steps: int = 0
    """End training after this many optimizer steps, for short trials; 0 sets no limit."""
    seed: int = 0
    """Seed of the initial weights, data order, augmentation and dropout."""
    accumulate: int = 1
    """Number of micro-batches per optimizer step; each holds `data.batch` / `accumulate` samples."""
    resume: str = ""
    """`auto` resumes from the newest complete checkpoint in this run's folder; a path resumes from that checkpoint
    folder. Empty starts from the beginning."""
    save_every: int = 0
    """Save a checkpoint every so many optimizer steps, in addition to one per epoch; 0 saves once per epoch only."""
    keep: int = 2
    """Number of newest checkpoints to keep; at least 2, so that another remains if one is damaged."""
    evaluate_every: int = 1
    """Evaluate every so many epochs; the last epoch is always evaluated."""
    log_every: int = 10
    """Write a line of metrics every so many optimizer steps."""
    device: str = "auto"
    """Device that trains: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one."""
    deterministic: bool = True
    """Choose algorithms whose results are bit-identical from run to run; this costs some speed on a GPU."""


@dataclass
class PlacementConfig:
    """Which rank owns which block when torchrun starts several ranks: a mesh of pipeline stages x replicas."""

    stages: list[int] = field(default_factory=list)
    """Stage of each block, such as [0, 0, 1, 1]. If empty, the engine times the blocks and balances the stages when
    training starts."""
    memory: str = ""
    """Memory budget for the tensors of one rank, such as 4GiB; balancing by time stays within it. Empty sets no
    budget."""
    replicas: int = 1
    """Number of ranks that own the same blocks; each of these replicas trains on its part of every batch."""
    replication: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    """What replicas shard: nothing (`ddp`), optimizer state (`zero1`), optimizer state and gradients (`zero2`), or
    parameters as well (`fsdp`, `zero3`)."""
    offload_optimizer: bool = False
    """With `zero1` to `zero3`, keep optimizer state in main memory and update there. This takes less GPU memory and
    more time."""
    sync_batch_norm: bool = True
    """Let BatchNorm compute its statistics over the samples of all replicas; otherwise each replica uses its own
    samples."""
    depth: int = 2
    """Messages that may wait at either end of a link; a larger value hides slower links and takes more memory."""
    timeout: float = 300.0
    """End the job if a neighbouring rank gives no sign of life for this many seconds."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Library that carries tensors: NCCL between GPUs, or gloo through main memory; `auto` takes NCCL if every rank has
    a GPU of its own."""


@dataclass
class OutputConfig:
    """Where a run writes its files."""

    root: str = "runs"
    """Folder that holds the folders of all runs."""
    name: str = ""
    """Name of this run's folder inside `root`; if empty, the name of the config file."""


@dataclass
class Config:
    """The sections that every task's config has; a task adds `model` and `data`."""

    task: str = ""
    """Which task to train, by its folder under tasks/: classification, style_transfer/scin, ..."""
    local: LocalConfig = field(default_factory=LocalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def check(self) -> None:
        """Refuse values, and combinations of values, that no run can use.

        Raises:
            ValueError: a value is out of range or two keys conflict. The message names the key, its value and the
                remedy.
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
        # torch.optim.SGD refuses this as well, but its message does not name the config's key.
        if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum <= 0:
            raise ValueError("optimizer.nesterov: needs optimizer.momentum above 0; set optimizer.nesterov false")
        # All three decide what autograd saves for backward: the compiler makes its own choice of what to recompute,
        # and offload's saved-tensor hooks would see the tensors that recomputation is about to discard.
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
            raise ValueError("placement.memory: has no effect where placement.stages is given; leave one of them out")
        if optimizer.lr <= 0:
            raise ValueError(f"optimizer.lr: {optimizer.lr} must be above 0")
        if optimizer.schedule == "step" and not optimizer.milestones:
            raise ValueError("optimizer.milestones: empty; schedule `step` needs at least one epoch")


def at_least(*checks: tuple[str, float, float]) -> None:
    """Check lower bounds, given as (key, value, least).

    Raises:
        ValueError: a value is below its least. The message names the key.
    """
    for key, value, least in checks:
        if value < least:
            raise ValueError(f"{key}: {value} is too small; the least is {least}")


AnyConfig = TypeVar("AnyConfig", bound=Config)


def config_file(argv: Sequence[str]) -> Path | None:
    """The file that ``--config`` names; the last one if ``--config`` occurs several times, None without it."""
    files = [value for key, value in pairwise(words(argv)) if key == "--config"]
    return Path(files[-1]) if files else None


def task_name(argv: Sequence[str]) -> str:
    """The name of the task: from ``--task`` in ``argv``, otherwise from the config file.

    The task must be known before anything is parsed, because it decides which config class does the parsing.

    Raises:
        ValueError: neither ``--task`` nor ``--config`` is given, or the config file cannot be read or names no task.
    """
    named = [value for key, value in pairwise(words(argv)) if key == "--task"]
    if named:
        return named[-1]
    file = config_file(argv)
    if file is None:
        raise ValueError("--config: no file given; tasks/*/configs/ and tasks/*/*/configs/ have them")
    content = read_yaml(file)
    if name := content.get("task"):
        return str(name)
    keys = {str(key).lower(): str(key) for key in content}
    other = keys.get(nearest("task", keys, cutoff=0.6), "task")
    raise ValueError(
        f"{file}: unknown key {other!r}, did you mean 'task'?"
        if other != "task"
        else f"{file}: task: no value given; it is the name of a folder under tasks/"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ValueError: the file does not exist, is not YAML, or holds something other than a mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config: no such file: {path}")
    try:
        text = path.read_text()
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    except yaml.YAMLError as error:
        hints_ = filter(None, (colon_hint(line.strip()) for line in text.splitlines()))
        raise ValueError(f"{path}: not YAML: {one_line(error)}{next(hints_, '')}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a config is a mapping of sections, this is {type(content).__name__}{colon_hint(content)}"
        )
    return content  # sections and keys are checked in ``parse``


def parse(config_class: type[AnyConfig], argv: Sequence[str], program: str = "tools/train.py") -> AnyConfig:
    """Read ``--config FILE`` and ``--section.key value`` overrides into ``config_class``.

    Raises:
        ValueError: a key is unknown (the message suggests the nearest known key), a value has the wrong type, or
            ``Config.check`` refuses it.
    """
    argv = _renamed_words(words(argv))
    known, sections = hints(config_class), typing.get_type_hints(config_class)
    file, auxiliary, given = config_file(argv), LocalConfig.auxiliary, {}
    if file is not None:
        content = read_yaml(file)
        if renamed_keys(content.get("local")):
            # jsonargparse takes text in place of a file's name, so the user's file can stay as it is. JSON quotes every
            # string; YAML written by PyYAML would leave "1e5" bare, which jsonargparse reads as a number.
            at = max(number for number, word in enumerate(argv) if word == "--config")
            argv[at + 1] = json.dumps(content, default=str)
        # Check keys here: jsonargparse reports an unknown key without the file's name or a suggestion.
        given = flat(content)
        check_keys(given, known, f"{file}: ")
        for name, value in content.items():
            if dataclasses.is_dataclass(sections.get(name)) and not isinstance(value, dict):
                raise ValueError(
                    f"{file}: {name}: a section is a mapping of keys, this is {type(value).__name__}{colon_hint(value)}"
                )
        for name, value in given.items():
            if value is None and name in known and not takes_none(known[name]):
                raise ValueError(f"{file}: {name}: no value given; leave the key out, or give one")
            if name not in sections and isinstance(value, dict) and (hint := colon_hint(value)):
                raise ValueError(f"{file}: {name}{hint}")
        auxiliary = (content.get("local") or {}).get("auxiliary", auxiliary)
    # Remember the name itself: --local.auxiliary.option turns it into a mapping that no longer holds the name.
    auxiliary = next((value for key, value in reversed(list(pairwise(argv))) if key == "--local.auxiliary"), auxiliary)
    typed = {word[2:].rstrip("+"): following for word, following in pairwise([*argv, ""]) if word.startswith("--")}
    check_keys(typed, {**known, "config": str, "help": str, "print_config": str}, "")
    for name, value in typed.items():
        if value.startswith("{") and (hint := colon_hint(loaded(value))):
            raise ValueError(f"{name}{hint}")
    parser = jsonargparse.ArgumentParser(
        prog=program, exit_on_error=False, description=(config_class.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", action="config", help="YAML file with the sections below")
    parser.add_class_arguments(config_class)
    options = joined(argv)
    try:
        values = vars(parser.instantiate(parser.parse_args(options)))
        config = config_class(**{name: value for name, value in values.items() if name != "config"})
    except (argparse.ArgumentError, TypeError) as error:
        # Which one is wrong shows when each is parsed alone: the file may have one value of a key, the command line
        # another.
        for key, _, value in (option[2:].partition("=") for option in options if "=" in option):
            try:
                parser.parse_args([f"--{key}={value}"])
            except (argparse.ArgumentError, TypeError) as own:
                where, its = (f"{file}: ", given) if key == "config" else ("", {key.rstrip("+"): value})
                raise ValueError(where + parser_message(own, known, its)) from own
        raise ValueError(parser_message(error, known, {**given, **typed})) from error
    chosen = config.local.auxiliary
    if isinstance(chosen, dict):
        # Overrides of options arrive as text, because the annotation ``dict[str, Any]`` gives jsonargparse no type.
        chosen = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in chosen.items()}
        if "type" not in chosen and isinstance(auxiliary, str):
            chosen = {"type": auxiliary, **chosen}  # --local.auxiliary.option on top of a plain name
        config.local.auxiliary = chosen
    elif any(word.startswith("--local.auxiliary.") for word in argv):
        raise ValueError(
            f"local.auxiliary: options come after the name: --local.auxiliary {chosen} --local.auxiliary.KEY"
        )
    cut = config.local.cut
    for name in ("local.blocks", "local.balance"):  # of a file, which may be a saved, complete config, both are fine
        if cut and name in typed and not (name == "local.blocks" and config.local.blocks == len(cut) + 1):
            raise ValueError(
                f"{name}: has no effect beside local.cut; leave it out, or add --local.cut [] to drop the cut"
            )
    config.check()
    return config


def to_yaml(config: Config) -> str:
    """The complete, resolved config as YAML text, in the order of the fields."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def save(config: Config, path: Path) -> None:
    """Write the complete, resolved config to ``path``.

    Raises:
        WriteError: the disk is full, for example.
    """
    write_text(path, to_yaml(config))


RECOMPUTE = {"true": "units", "yes": "units", "false": "none", "no": "none"}
"""The value of ``local.recompute`` for each value of ``local.checkpoint``, the old name of that key."""


def renamed_keys(local: Any) -> bool:
    """Rename, in place, the keys of a ``local`` section that are known under a new name; tell whether there were any.

    Raises:
        ValueError: an old key has a value that it never accepted.
    """
    if not isinstance(local, dict) or "checkpoint" not in local:
        return False
    if "recompute" in local:
        raise ValueError(
            "local.checkpoint: this is the old name of local.recompute, and both are given; remove local.checkpoint"
        )
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
    if first_of_host():
        console.print(
            f"local.checkpoint {value} is now local.recompute {RECOMPUTE[value]}; the old key will be removed"
        )
    return RECOMPUTE[value]
