"""Figures of predicted noise, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tasks.style_transfer.diffusion.evaluate import NoiseMetrics, whole_here

KINDS, COLLECTIONS = ["own", "none", "other"], ["monet", "cezanne"]

Case = tuple[int, int, int, float]
"""Kind, collection, noise, mean squared error."""
CASES: list[Case] = [
    # Noise 0: everyone's own is best on average, though not for monet's second work.
    *((0, 0, 0, 1.0), (1, 0, 0, 4.0), (2, 0, 0, 2.0)),
    *((0, 0, 0, 3.0), (1, 0, 0, 2.0), (2, 0, 0, 5.0)),
    *((0, 1, 0, 6.0), (1, 1, 0, 7.0), (2, 1, 0, 9.0)),
    # Noise 1: monet's own is, cezanne's is not.
    *((0, 0, 1, 1.0), (1, 0, 1, 2.0), (2, 0, 1, 3.0)),
    *((0, 1, 1, 8.0), (1, 1, 1, 9.0), (2, 1, 1, 5.0)),
]


def metrics(
    cases: Sequence[Case], *sizes: int, kinds: Sequence[str] = KINDS, names: Sequence[str] = COLLECTIONS
) -> Any:
    """Having seen predictions with just these errors, in batches of ``sizes``; every target's values are all 0.5."""
    made, start = NoiseMetrics(kinds, names, None), 0
    for size in sizes or [len(cases)]:
        lot = cases[start : start + size]
        kind, collection, noise, errors = (torch.tensor(column) for column in zip(*lot, strict=True))
        target = torch.full((len(lot), 4, 2, 2), 0.5)
        signs = torch.tensor([1.0, -1, -1, 1]).view(2, 2)
        made.update(
            target + errors.sqrt().view(-1, 1, 1, 1) * signs,
            {"target": target, "kind": kind, "collection": collection, "noise": noise},
        )
        start += size
    assert start >= len(cases)
    return made


def test_figures_by_hand() -> None:
    assert metrics(CASES).compute() == pytest.approx(
        {
            "noise_mse": (1 + 3 + 6 + 1 + 8) / 5,
            "noise_mse_none": (4 + 2 + 7 + 2 + 9) / 5,
            "noise_mse_other": (2 + 5 + 9 + 3 + 5) / 5,
            "zero_mse": 0.25,
            "own_is_best": 0.5,
            "monet_own": (1 + 3 + 1) / 3,
            "monet_none": (4 + 2 + 2) / 3,
            "monet_other": (2 + 5 + 3) / 3,
            "monet_own_is_best": 1.0,
            "cezanne_own": (6 + 8) / 2,
            "cezanne_none": (7 + 9) / 2,
            "cezanne_other": (9 + 5) / 2,
            "cezanne_own_is_best": 0.5,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("sizes", [[1] * 15, [4, 11], [14, 1]])
def test_batches_and_order_change_no_figure(sizes: list[int]) -> None:
    shuffled = [CASES[place] for place in torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()]
    wanted = metrics(CASES).compute()
    for cases in (CASES, shuffled):
        found = metrics(cases, *sizes).compute()
        assert list(found) == list(wanted)
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("others", "share"),
    [((2.0, 3.0), 1.0), ((3.0, 2.0), 1.0), ((0.5, 3.0), 0.0), ((3.0, 0.5), 0.0), ((1.0, 3.0), 0.0)],
)
def test_own_is_best_where_all_others_are_worse(others: tuple[float, float], share: float) -> None:
    cases = [(kind, 0, 4, error) for kind, error in enumerate((1.0, *others))]
    assert metrics(cases).compute()["own_is_best"] == share


def test_what_there_is_one_of_has_no_figures_of_its_own() -> None:
    found = metrics([(0, 0, 0, 2.0), (0, 0, 1, 4.0)], kinds=["own"], names=["monet"]).compute()
    assert found == pytest.approx({"noise_mse": 3.0, "zero_mse": 0.25}, rel=1e-5)
    found = metrics(CASES[:3], names=["monet"]).compute()
    assert list(found) == ["noise_mse", "noise_mse_none", "noise_mse_other", "zero_mse", "own_is_best"]


def test_errors_are_reckoned_in_full_precision() -> None:
    made = NoiseMetrics(["own"], ["monet"], None)
    numbers = torch.zeros(1, dtype=torch.long)
    target = torch.full((1, 4, 2, 2), 1e-3, dtype=torch.float16)
    made.update(torch.zeros_like(target), {"target": target, "kind": numbers, "collection": numbers, "noise": numbers})
    assert made.compute()["noise_mse"] == pytest.approx(float(target[0, 0, 0, 0]) ** 2, rel=1e-5)


def test_figures_of_pictures_are_added(tmp_path: Path) -> None:
    asked: list[Path] = []

    def make(folder: Path) -> dict[str, float]:
        asked.append(folder)
        return {"edge_ssim": 0.5}

    made = metrics(CASES[:3])
    made.make_pictures = make
    assert "edge_ssim" not in made.compute()
    assert not asked, "only where there is a folder for them"
    made.save(tmp_path)
    assert asked == [tmp_path]
    assert made.compute()["edge_ssim"] == 0.5
    assert made.compute()["noise_mse"] == pytest.approx(1.0)
    without = metrics(CASES[:3])
    without.save(tmp_path)
    assert made.compute().keys() - without.compute().keys() == {"edge_ssim"}


def test_whether_all_of_a_model_is_here() -> None:
    assert whole_here(nn.Linear(2, 2))
    assert not whole_here(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    freed = nn.Linear(2, 2)
    freed.weight.data = torch.empty(0)
    assert not whole_here(freed)
