"""Networks of users' own: refused in one line, or the same bits with recomputation, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.fuzz import networks
from tests.fuzz.mistakes import fuzz, train
from tests.tools.commands import SMOKE
from tests.toy import assert_equal

WORDS = [*SMOKE, "--model.name", "tests.fuzz.networks:chain", "--data.size", "8", "--data.subset", "64"]
WORDS += [
    "--data.batch",
    "32",
    "--train.epochs",
    "2",
    "--train.steps",
    "0",
    "--optimizer.lr",
    "0.01",
    "--output.root",
    "runs",
]


# More blocks than there are units are a mistake too.
NAMED = [*(f"'layer{number}'" for number in range(5)), "'layer'", "'head'", "local.blocks"]


def weights(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    newest = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    files = sorted(newest.glob("*.safetensors"))
    assert files
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@fuzz(
    traits=st.lists(st.sampled_from(networks.TRAITS), min_size=2, max_size=5),
    mistakes=st.just([]) | st.lists(st.sampled_from(networks.MISTAKES), max_size=2, unique=True),
    blocks=st.integers(1, 4),
    auxiliary=st.sampled_from(
        ["glcan", "greedy", "dgl", '{"type": "glcan", "reduce": 1}', '{"type": "glcan", "width": 0.5}']
    ),
    schedule=st.sampled_from(["sequential", "end_to_end"]),
)
def test_a_network_of_ones_own(
    rooms: Any, traits: list[Any], mistakes: list[str], blocks: int, auxiliary: str, schedule: str
) -> None:
    room = rooms()
    networks.DRAWN[:], networks.CHAIN[:] = traits, mistakes
    local = ["--local.blocks", str(blocks), "--local.auxiliary", auxiliary, "--local.schedule", schedule]

    def run(name: str, *words: str) -> dict[str, Tensor] | None:
        done = train(room, *WORDS, *local, "--output.name", name, *words, named=NAMED)
        return None if done.returncode else weights(room / "runs" / name)

    torch.manual_seed(0)
    plain = run("plain")
    if plain is None:
        return
    recomputed = run("recomputed", "--local.recompute", "units")
    if recomputed is not None:
        assert_equal(recomputed, plain)
    assert run("halved", "--train.steps", "1") is not None
    resumed = run("halved", "--train.resume", "auto", "--train.steps", "0")
    assert resumed is not None
    assert_equal(resumed, plain)
