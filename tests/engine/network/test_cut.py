from itertools import combinations, pairwise

import pytest
import torch

from engine.network.cut import Span, cut_by_count, cut_by_names
from tests.toy import Toy


def bounds(spans: list) -> list[int]:
    return [spans[0].start, *(span.stop for span in spans)]


@pytest.mark.parametrize("units", [1, 2, 5, 9])
def test_every_unit_is_in_exactly_one_block(units: int) -> None:
    chain = Toy(depth=units).build_chain()
    for count in range(1, units + 1):
        spans = cut_by_count(chain, count)
        assert [unit for span in spans for unit in span.units(chain)] == chain.units
        assert [span.index for span in spans] == list(range(count))
        assert [span.last for span in spans] == [False] * (count - 1) + [True]


@pytest.mark.parametrize("seed", range(5))
def test_the_heaviest_block_is_the_lightest_possible(seed: int) -> None:
    chain = Toy(depth=8).build_chain()
    weights = torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    for count in range(1, 9):
        spans = cut_by_count(chain, count, [float(w) for w in weights])
        best = min(
            max(sum(weights[a:b]) for a, b in pairwise([0, *inner, 8]))
            for inner in combinations(range(1, 8), count - 1)
        )
        assert max(sum(weights[span.start : span.stop]) for span in spans) == best


def test_ties_are_even_with_light_early_blocks() -> None:
    assert bounds(cut_by_count(Toy(depth=10).build_chain(), 4)) == [0, 2, 4, 7, 10]


def test_parameters_as_weights() -> None:
    chain = Toy(depth=4).build_chain()
    chain.units[3].module.linear = torch.nn.Linear(6, 600)
    assert bounds(cut_by_count(chain, 2, "parameters")) == [0, 3, 4]


def test_cut_by_names_starts_blocks_there() -> None:
    assert bounds(cut_by_names(Toy(depth=5).build_chain(), ["layer1", "layer4"])) == [0, 1, 4, 5]


def test_bad_cuts_name_the_culprit() -> None:
    chain = Toy(depth=3).build_chain()
    with pytest.raises(ValueError, match=r"4 blocks asked for, the network has 3 units"):
        cut_by_count(chain, 4)
    with pytest.raises(ValueError, match=r"0 blocks asked for"):
        cut_by_count(chain, 0)
    with pytest.raises(ValueError, match=r"'layer9' is not a unit.*layer0, layer1, layer2"):
        cut_by_names(chain, ["layer9"])
    with pytest.raises(ValueError, match="'layer1' must come after"):
        cut_by_names(chain, ["layer2", "layer1"])
    with pytest.raises(ValueError, match="'layer0' must come after"):
        cut_by_names(chain, ["layer0"])
    with pytest.raises(ValueError, match="2 weights for 3 units"):
        cut_by_count(chain, 2, [1.0, 2.0])


def test_a_block_with_nothing_to_train_is_merged_with_its_neighbour() -> None:
    chain = Toy(depth=3).build_chain()
    chain.units[0].module.requires_grad_(False)
    assert cut_by_count(chain, 3) == [Span(0, 2, 0, 2, ("layer0",)), Span(1, 2, 2, 3)]
    assert cut_by_names(chain, ["layer2"]) == [Span(0, 2, 0, 2), Span(1, 2, 2, 3)], "its neighbour trains"
    chain.units[1].module.requires_grad_(False)
    assert cut_by_count(chain, 3) == [Span(0, 1, 0, 3, ("layer0", "layer1"))]
    chain.head.module.requires_grad_(False)
    chain.units[0].module.requires_grad_(True)
    chain.units[2].module.requires_grad_(False)
    assert cut_by_count(chain, 3) == [Span(0, 1, 0, 3, ("layer1", "layer2"))], "the last has no next"
    chain.units[0].module.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter; unfreeze"):
        cut_by_count(chain, 3)


def test_the_last_block_has_the_head_to_train() -> None:
    chain = Toy(depth=3).build_chain()
    chain.units[2].module.requires_grad_(False)
    assert len(cut_by_count(chain, 3)) == 3
