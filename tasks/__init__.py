"""Tasks: each folder turns a kind of problem into chains, data, heads and a metric for the engine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config, parse, task_name
from engine.utilities.text import none_of
from tasks import torchvision_hook

torchvision_hook.install()


@dataclass(frozen=True)
class TaskEntry:
    """How tools find a task.

    Args:
        config: the class of its config.
        task: the class built from such a config, as ``module:Class``, so that reading a config imports no framework.
    """

    config: type[Config]
    task: str

    def build(self, config: Config) -> Any:
        """The task of a config.

        Raises:
            ValueError: the task lacks a method, or refuses the config.
        """
        from engine.task import check_complete  # here, because it imports torch

        module, _, name = self.task.partition(":")
        task = getattr(importlib.import_module(module), name)(config)
        check_complete(task)
        return task


def find_task(name: str) -> TaskEntry:
    """The task in the folder ``tasks/<name>``; those of several methods are one level down (``style_transfer/scin``).

    Raises:
        ValueError: there is no such task (the message names the nearest known one), or its folder has no ``configs``.
    """
    root = Path(__file__).parent
    known = sorted(folder.parent.relative_to(root).as_posix() for folder in root.glob("**/configs"))
    family = any(other.startswith(f"{name}/") for other in known)
    if name and name not in known and not family and (root / name / "__init__.py").is_file():
        raise ValueError(f"task: tasks/{name} has no configs/ folder, by which tasks are found")
    if name not in known:
        raise ValueError(f"task: {none_of(name, known)}")
    entry: TaskEntry = importlib.import_module(f"tasks.{name.replace('/', '.')}").TASK
    return entry


def load(argv: Sequence[str]) -> tuple[Config, Any]:
    """The config that a command line gives, and its task.

    Raises:
        ValueError: no such task, or anything wrong in the config.
    """
    entry = find_task(task_name(argv))
    config = parse(entry.config, argv)
    return config, entry.build(config)
