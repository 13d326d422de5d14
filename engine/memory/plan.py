"""Find the way to train that fits a memory budget: the fewest blocks, and the least time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path

from engine.config import Config, Recompute, to_yaml
from engine.learning.build import batch_norm_name, build_blocks
from engine.memory.estimate import Estimate, estimate_step
from engine.memory.profile import Profile
from engine.memory.work import Speed
from engine.network.cut import best_bounds
from engine.network.shapes import shapes_of
from engine.task import Task
from engine.utilities.files import write_text
from engine.utilities.size import size_text

MARK = "# Planned for"
"""First words of a file that ``write_plan`` wrote; only such a file may be overwritten."""

SLACK = 1.08
"""A profile may overstate a peak by this factor, so a cut is tried if its profiled peak is below budget * SLACK."""


@dataclass(frozen=True)
class Option:
    """One way to train: a config with its cut, and the estimate of a step."""

    config: Config
    micro_batch: int
    estimate: Estimate

    @property
    def peak_bytes(self) -> int:
        return self.estimate.footprint.peak_bytes

    @property
    def name(self) -> str:
        """Its name in tables, such as ``4 blocks + recompute``."""
        blocks = len(self.estimate.units)
        name = "end-to-end" if blocks == 1 else f"{blocks} blocks"
        local = self.config.local
        extras = {"recompute": local.recompute != "none", "offload": local.offload}
        return " + ".join([name, *(shown for shown, wanted in extras.items() if wanted)])


@dataclass(frozen=True)
class Plan:
    """The chosen option, the budget that it fits, and the options that it was compared with.

    ``rivals`` are end-to-end training without and, where the config allows it, with recomputation, at the config's own
    micro-batch, whether they fit or not. ``others`` are the other options at the chosen micro-batch: each fits but is
    slower, or is the smallest of its kind and still too large.
    """

    budget_bytes: int
    chosen: Option
    rivals: list[Option]
    others: list[Option]


def make_plan(config: Config, build_task: Callable[[Config], Task], budget_bytes: int, speed: Speed) -> Plan:
    """Find the fewest blocks, and the cut, that fit the budget in the least estimated time.

    If end-to-end training fits, it is chosen. Otherwise the search looks for the fewest blocks that fit, once with and
    once without recomputation inside blocks, and chooses the faster of the two. (One block with recomputation is
    end-to-end training with recomputation.) Only if neither fits does it halve the micro-batch, as often as necessary,
    because this changes what normalisation sees and therefore the result.

    For each number of blocks, dynamic programming over the profiled costs of units and auxiliary networks (see
    ``engine.memory.profile``) proposes the fastest cut that fits, then the cut with the smallest peak. An estimate of
    the whole step decides on each proposal.

    Args:
        config: everything except ``local.cut``, ``local.blocks``, ``local.recompute`` and ``train.accumulate`` stays as
            it is; ``local.schedule`` changes only between end-to-end and local training.
        build_task: makes the task of a config.
        budget_bytes: the budget for tensors. A GPU needs more than that: about half a GiB for CUDA itself, and
            workspaces.
        speed: the speed of the device that will train.

    Raises:
        ValueError: nothing fits. The message gives the smallest peak that can be achieved, and what determines it.
    """
    rivals: list[Option] = []
    smallest: tuple[float, _Search, list[int], Recompute] | None = None
    for settings in _micro_batches(config, build_task):
        search = _Search(settings, build_task, speed, budget_bytes)
        if not rivals:  # the first round: the config's own micro-batch
            if search.profile.permanent > budget_bytes:
                raise ValueError(
                    f"--memory: {size_text(budget_bytes)} is less than the {size_text(search.profile.permanent)} that "
                    "parameters, buffers and optimizer state need; no cut changes that"
                )
            rivals = [search.option([0, len(search.profile)], recompute) for recompute in search.choices]
            if rivals[0].peak_bytes <= budget_bytes:
                return Plan(budget_bytes, rivals[0], rivals, [])
        found = [search.fewest(recompute) for recompute in search.choices]
        fitting = [option for option in found if option]
        if fitting:
            chosen = min(fitting, key=lambda option: option.estimate.step_seconds)
            others = [
                option or search.option(search.smallest(recompute)[1], recompute)
                for option, recompute in zip(found, search.choices, strict=True)
                if option is not chosen
            ]
            return Plan(budget_bytes, chosen, rivals, others)
        for recompute in search.choices:
            total, bounds = search.smallest(recompute)
            if smallest is None or total < smallest[0]:
                smallest = total, search, bounds, recompute
    assert smallest is not None, "there is always the config's own micro-batch"
    _, search, bounds, recompute = smallest
    least = search.option(bounds, recompute)
    # A profile may overstate a peak even beyond SLACK, so estimate the smallest option before giving up.
    if least.peak_bytes <= budget_bytes:
        return Plan(budget_bytes, least, rivals, [])
    raise ValueError(_why(least, budget_bytes))


def smallest_cut(config: Config, build_task: Callable[[Config], Task], blocks: int, speed: Speed) -> list[str]:
    """The cut into ``blocks`` blocks with the smallest profiled peak, as a value of ``local.cut``."""
    search = _Search(config, build_task, speed, 0)
    return search.cut(search.bounds(blocks, config.local.recompute))


def _micro_batches(config: Config, build_task: Callable[[Config], Task]) -> Iterator[Config]:
    """Yield the config, then the config with its micro-batch halved, quartered, ..., as long as training allows it."""
    accumulate = config.train.accumulate
    most = shapes_of(build_task(config).example).batch * accumulate
    yield config
    while (accumulate := 2 * accumulate) <= most:
        settings = replace(config, train=replace(config.train, accumulate=accumulate))
        try:
            settings.check()
        except ValueError:  # ``accumulate`` does not divide the batch
            continue
        # BatchNorm cannot train on one sample. Look at two blocks, because auxiliary networks may add a BatchNorm.
        task = build_task(settings)
        if shapes_of(task.example).batch == 1:
            chain = task.build_chain(initial=False)
            two = replace(settings.local, blocks=min(2, len(chain)), cut=[])
            if batch_norm_name(build_blocks(chain, replace(settings, local=two), task)):
                return
        yield settings


def free_name(stem: str) -> Path:
    """The first of ``stem.yaml``, ``stem-2.yaml``, ... that does not exist."""
    names = (Path(f"{stem}{'' if number == 1 else f'-{number}'}.yaml") for number in count(1))
    return next(name for name in names if not name.exists())


def check_free(path: Path) -> None:
    """Check that a plan may be written to ``path``: it does not exist, or is an earlier plan.

    Raises:
        ValueError: the path exists and is not a plan.
    """
    if path.exists() and not (path.is_file() and path.read_text().startswith(MARK)):
        raise ValueError(f"--out: {path} exists and is not a plan; choose another file")


def write_plan(plan: Plan, path: Path) -> None:
    """Write the chosen option as a complete config for ``tools/train.py``.

    Raises:
        ValueError: the file cannot be written.
    """
    chosen = plan.chosen
    about = f"{chosen.name}, micro-batch {chosen.micro_batch}, predicted peak {size_text(chosen.peak_bytes)}"
    write_planned(path, size_text(plan.budget_bytes), about, chosen.config)


def write_planned(path: Path, aim: str, about: str, config: Config) -> None:
    """Write a config that was planned for ``aim`` (a budget, a number of ranks), with a first line that says so.

    Raises:
        ValueError: the file cannot be written.
    """
    write_text(path, f"{MARK} {aim}: {about}.\n{to_yaml(config)}")


class _Search:
    """The cuts of one network at one micro-batch."""

    def __init__(self, config: Config, build_task: Callable[[Config], Task], speed: Speed, budget: int) -> None:
        self.config, self.task, self.speed, self.budget = config, build_task(config), speed, budget
        self.profile = profile = Profile(config, self.task, speed)
        self._options: dict[tuple[tuple[int, ...], Recompute], Option] = {}
        self.choices: list[Recompute] = ["none", "units"] if profile.can_recompute else ["none"]
        # For each choice and number of blocks, the cut with the smallest peak.
        self._even = {
            recompute: best_bounds(len(profile), len(profile), self._cost(recompute)) for recompute in self.choices
        }

    def _cost(self, recompute: Recompute, limit: float = math.inf) -> Callable[[int, int], tuple[float, float]]:
        """A cost for ``best_bounds``: (peak, seconds) of a block.

        With a ``limit``, all blocks whose peak is within it have weight 0, so that only their time decides.
        """

        def cost(start: int, stop: int) -> tuple[float, float]:
            if not self.profile.trainable(start, stop):
                return math.inf, math.inf
            peak = self.profile.peak(start, stop, recompute)
            weight = peak if limit == math.inf else 0 if peak <= limit else math.inf
            return weight, self.profile.seconds(start, stop, recompute)

        return cost

    def _fixed(self, bounds: list[int]) -> int:
        """The bytes that are alive all the time with this cut."""
        return self.profile.least + sum(self.profile.state(start, stop) for start, stop in pairwise(bounds))

    def fewest(self, recompute: Recompute) -> Option | None:
        """The option with the fewest blocks that fits the budget, or None."""
        for blocks, (peak, even) in enumerate(self._even[recompute], 1):
            fixed = self._fixed(even)
            if fixed + peak > SLACK * self.budget:
                continue
            cost = self._cost(recompute, self.budget - fixed)
            weight, fast = best_bounds(len(self.profile), blocks, cost)[-1]
            for bounds in [fast, even] if weight == 0 and fast != even else [even]:
                option = self.option(bounds, recompute)
                if option.peak_bytes <= self.budget:
                    return option
        return None

    def bounds(self, blocks: int, recompute: Recompute) -> list[int]:
        """The bounds of the cut into ``blocks`` blocks with the smallest profiled peak."""
        return self._even[recompute][blocks - 1][1]

    def smallest(self, recompute: Recompute) -> tuple[float, list[int]]:
        """The smallest profiled peak over all numbers of blocks, and its bounds."""
        return min((self._fixed(bounds) + peak, bounds) for peak, bounds in self._even[recompute] if peak < math.inf)

    def cut(self, bounds: list[int]) -> list[str]:
        """The cut at ``bounds``, as a value of ``local.cut``."""
        return [self.profile.names[start] for start in bounds[1:-1]]

    def option(self, bounds: list[int], recompute: Recompute) -> Option:
        """The option with the cut at ``bounds``; each is estimated only once."""
        key = tuple(bounds), recompute
        if key not in self._options:
            self._options[key] = self._estimated(bounds, recompute)
        return self._options[key]

    def _estimated(self, bounds: list[int], recompute: Recompute) -> Option:
        chain, local = self.task.build_chain(initial=False), self.config.local
        schedule = "sequential" if local.end_to_end else local.schedule
        local = replace(
            local,
            blocks=len(bounds) - 1,
            cut=self.cut(bounds),
            recompute=recompute,
            schedule="end_to_end" if len(bounds) == 2 else schedule,
        )
        config = replace(self.config, local=local)
        message = shapes_of(self.task.example)
        estimate = estimate_step(build_blocks(chain, config, self.task), config, message, self.speed)
        return Option(config, message.batch, estimate)


def _why(least: Option, budget: int) -> str:
    footprint = least.estimate.footprint
    number = max(range(len(footprint.by_block)), key=footprint.by_block_bytes.__getitem__)
    name, size = max(footprint.by_block[number].items(), key=lambda item: item[1])
    return (
        f"--memory: no plan fits {size_text(budget)}; the smallest achievable is {size_text(least.peak_bytes)} "
        f"({least.name}, micro-batch {least.micro_batch}), where block {number} ({least.estimate.units[number]}) "
        f"sets it with {size_text(size)} of {name}"
    )
