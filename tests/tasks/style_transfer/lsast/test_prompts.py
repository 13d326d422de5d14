"""The prompt space: which rows make which stage's prompts, and which stage a time has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.style_transfer.diffusion.base import Base
from tasks.style_transfer.diffusion.conditioner import Conditioner, prompt_tokens
from tasks.style_transfer.diffusion.text import encode
from tasks.style_transfer.lsast.prompts import PromptSpace, new_prompt

FORMS = pytest.mark.parametrize("form", ["paper", "released"])


def made(seed: int = 0, **settings: Any) -> PromptSpace:
    torch.manual_seed(seed)
    found = new_prompt(**{"form": "paper", "template": "*", "width": 8, **settings})
    assert isinstance(found, PromptSpace)
    return found


@pytest.mark.parametrize("stages", [1, 2, 10])
@pytest.mark.parametrize(("form", "step"), [("paper", 3), ("released", 1)])
def test_rows_of_each_stage(form: str, step: int, stages: int) -> None:
    space = made(form=form, stages=stages)
    rows, found = space.all_rows(), space()
    assert rows.shape == (3 * stages, 8)
    assert found.shape == (stages, 3, 1, 8)
    for stage in range(stages):
        for layer in range(3):
            assert torch.equal(found[stage, layer, 0], rows[stage * step + layer]), (stage, layer)


def test_which_rows_are_read() -> None:
    for form, count in (("paper", 30), ("released", 12)):
        assert made(form=form).rows.unique().tolist() == list(range(count))  # type: ignore[operator]


@FORMS
def test_both_forms_have_the_same_weights(form: str) -> None:
    """Which rows are read is a setting, not a weight: nothing of it is in a file."""
    space = made(form=form)
    assert "rows" not in space.state_dict()
    other = made(1, form="released" if form == "paper" else "paper")
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.all_rows(), space.all_rows())
    assert not torch.equal(other(), space())


def test_three_blocks_of_self_attention() -> None:
    """Every row hangs on every other; what the blocks make is brought to scale."""
    space = made(stages=2)
    assert len(space.blocks) == 3
    x = space.matrix[None]
    for block in space.blocks:
        x = block(x)
    torch.testing.assert_close(space.all_rows(), x[0])
    torch.testing.assert_close(made(stages=2, scale=0.02).all_rows(), 0.02 * x[0])
    for row in range(6):
        (slope,) = torch.autograd.grad(space.all_rows()[row].sum(), space.matrix)
        assert slope.abs().sum(1).min() > 0


@FORMS
def test_it_is_the_same_in_training_and_after(form: str) -> None:
    space = made(form=form)
    with torch.no_grad():
        torch.testing.assert_close(space.train()(), space.eval()())


def test_settings_make_another_of_the_kind() -> None:
    space = made(form="released", stages=4, scale=0.1, base="here", template="* by {artist}")
    again = new_prompt(**{key: value for key, value in space.settings.items() if key != "method"})
    assert again.settings == space.settings
    again.load_state_dict(space.state_dict())
    assert torch.equal(again(), space())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "ssam"}, r"^prompt.form: 'ssam' is none of paper, released$"),
        ({"tokens": 2}, r"^prompt.tokens: a prompt of LSAST is a single vector, not 2; set it to 1$"),
        ({"stages": 0}, r"^prompt.stages: 0 is too small; the least is 1$"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**settings)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("tiny")


@torch.no_grad()
def text(base: Base, encoder: Any, space: PromptSpace, stage: int, layer: int) -> Tensor:
    """What a layer is to read at a stage, its text encoded for itself."""
    ids, mask = prompt_tokens(base.tokenizer, "monet", space)
    return encode(encoder, ids, mask, space()[stage, layer][None])


@FORMS
@pytest.mark.parametrize(
    ("stages", "by_time"),
    [
        (10, {0: 0, 99: 0, 100: 1, 449: 4, 500: 5, 899: 8, 900: 9, 999: 9}),
        (3, {0: 0, 333: 0, 334: 1, 666: 1, 667: 2, 999: 2}),
        (1, {0: 0, 999: 0}),
    ],
)
def test_the_stage_of_a_time(base: Base, form: str, stages: int, by_time: dict[int, int]) -> None:
    encoder, space = base.text_encoder(), made(width=64, stages=stages, form=form)
    conditioner = Conditioner({"monet": space}, encoder, base.tokenizer, 1000)
    with torch.no_grad():
        found = conditioner(torch.zeros(len(by_time), dtype=torch.long), torch.tensor(list(by_time)), (0,))
    length = base.tokenizer.model_max_length
    assert found.shape == (len(by_time), 3 * length, 64)
    for each, stage in zip(found, by_time.values(), strict=True):
        for layer in range(3):
            wanted = text(base, encoder, space, stage, layer)[0]
            torch.testing.assert_close(each[layer * length : (layer + 1) * length], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_sample_has_its_artist_its_time_or_nothing(base: Base) -> None:
    encoder, spaces = (
        base.text_encoder(),
        {name: made(n, width=64, stages=4) for n, name in enumerate(("monet", "zoe"))},
    )
    conditioner = Conditioner(spaces, encoder, base.tokenizer, 1000)
    assert conditioner.nothing == 2
    found = conditioner(torch.tensor([1, 2, 0, 1]), torch.tensor([300, 300, 700, 999]), (0, 1, 2))
    length = base.tokenizer.model_max_length
    for each, (artist, stage) in zip(found, [("zoe", 1), ("", 0), ("monet", 2), ("zoe", 3)], strict=True):
        for layer, part in enumerate(each.split(length)):
            if artist:
                wanted = text(base, encoder, spaces[artist], stage, layer)[0]
            else:
                ids = torch.tensor([[base.tokenizer.bos_token_id, *[base.tokenizer.eos_token_id] * (length - 1)]])
                wanted = encode(encoder, ids)[0]
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)
