"""SSAM and the released form, reckoned another way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tasks.style_transfer.artbank.prompts import SSAM, ReleasedPrompt, SSAMPrompt, new_prompt


def by_loops(matrix: Any, query: Any, key: Any, value: Any) -> Any:
    """SSAM by its formula, number by number: A = softmax(QK^T / sqrt(d)), M = AV, S, S * Norm(I) + M."""
    rows, width = matrix.shape
    queries, keys, values = (
        [[sum(weight[i, j] * row[j] for j in range(width)) for i in range(width)] for row in matrix]
        for weight in (query, key, value)
    )
    result = np.zeros((rows, width))
    for n in range(rows):
        scores = [sum(queries[n][j] * keys[m][j] for j in range(width)) / math.sqrt(width) for m in range(rows)]
        shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
        centre = sum(matrix[n]) / width
        spread = sum((each - centre) ** 2 for each in matrix[n]) / width
        for j in range(width):
            mean = sum(shares[m] * values[m][j] for m in range(rows))
            square = sum(shares[m] * values[m][j] ** 2 for m in range(rows))
            deviation = math.sqrt(max(square - mean**2, 0) + 1e-6)
            result[n, j] = deviation * (matrix[n, j] - centre) / math.sqrt(spread + 1e-5) + mean
    return result


@pytest.mark.parametrize(("rows", "width"), [(3, 2), (1, 3), (4, 5)])
def test_ssam_by_its_formula(rows: int, width: int) -> None:
    torch.manual_seed(rows)
    module, matrix = SSAM(width).double(), torch.randn(rows, width, dtype=torch.float64) * 2
    weights = [each.weight.detach().numpy() for each in (module.query, module.key, module.value)]
    wanted = by_loops(matrix.numpy(), *weights)
    found = module(matrix)
    assert found.shape == (rows, width)
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_ssam_by_hand() -> None:
    """Queries of zero: every row pays equal heed to all."""
    module, matrix = SSAM(2), torch.tensor([[1.0, 3], [3, 7], [5, 5]])
    with torch.no_grad():
        module.query.weight.zero_()
        module.value.weight.copy_(torch.eye(2))
    # Norm of a row of two is -1 and 1, by whichever is larger; of equal ones 0.
    mean, deviation = torch.tensor([3.0, 5]), torch.tensor([8 / 3, 8 / 3]).sqrt()
    signs = torch.tensor([[-1.0, 1], [-1, 1], [0, 0]])
    torch.testing.assert_close(module(matrix), mean + deviation * signs, rtol=1e-4, atol=1e-4)


def saturated(width: int = 4) -> tuple[SSAM, Tensor]:
    """One row takes all attention: variances are 0, and there is no choice left."""
    torch.manual_seed(0)
    module, matrix = SSAM(width), torch.randn(3, width)
    with torch.no_grad():
        for each in (module.query, module.key):
            each.weight.copy_(torch.eye(width) * 1000)
    return module, matrix


def test_gradients_are_finite_where_one_row_takes_all_attention() -> None:
    module, matrix = saturated()
    attention = (module.query(matrix) @ module.key(matrix).T / 2).softmax(1)
    assert set(attention.flatten().tolist()) == {0.0, 1.0}
    matrix.requires_grad_()
    found = module(matrix)
    torch.testing.assert_close(
        found, attention @ module.value(matrix) + 1e-3 * F.layer_norm(matrix, (4,)), rtol=1e-3, atol=1e-4
    )
    found.square().sum().backward()
    for gradient in (matrix.grad, *(parameter.grad for parameter in module.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert matrix.grad is not None
    assert matrix.grad.abs().sum() > 0


def made(**settings: Any) -> Any:
    torch.manual_seed(0)
    return new_prompt(**{"form": "ssam", "template": "*", "width": 6, **settings})


@pytest.mark.parametrize(("rows", "tokens"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_rows_are_pooled_to_tokens(rows: int, tokens: int) -> None:
    prompt = made(rows=rows, tokens=tokens)
    assert isinstance(prompt, SSAMPrompt)
    assert prompt.matrix.shape == (rows, 6)
    each, size = prompt.ssam(prompt.matrix), rows // tokens
    found = prompt()
    assert found.shape == (1, 1, tokens, 6)
    for token in range(tokens):
        torch.testing.assert_close(found[0, 0, token], each[token * size : (token + 1) * size].mean(0))


@pytest.mark.parametrize("width", [6, 7, 64])
def test_the_released_form_is_two_linear_maps(width: int) -> None:
    """Of one vector attention to itself is no choice."""
    prompt = made(form="released", width=width)
    assert isinstance(prompt, ReleasedPrompt)
    assert prompt.matrix.shape == (1, 1, width)
    with torch.no_grad():
        torch.nn.init.normal_(prompt.attention.to_out[0].bias)
    value, output = prompt.attention.to_v, prompt.attention.to_out[0]
    assert value.bias is None
    vector = prompt.matrix[0, 0]
    wanted = output.weight @ (value.weight @ vector) + output.bias
    found = prompt()
    assert found.shape == (1, 1, 1, width)
    torch.testing.assert_close(found[0, 0, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["ssam", "released"])
def test_the_scale_is_that_of_token_embeddings(form: str) -> None:
    torch.testing.assert_close(made(form=form, scale=0.02)(), 0.02 * made(form=form)())


@pytest.mark.parametrize("form", ["ssam", "released"])
def test_all_that_matters_learns(form: str) -> None:
    prompt = made(form=form)
    prompt().square().sum().backward()
    idle = {name for name, parameter in prompt.named_parameters() if not parameter.grad.any()}
    # Attention of one vector to itself does not hang on queries and keys.
    assert idle == ({"attention.to_q.weight", "attention.to_k.weight"} if form == "released" else set())


def test_an_untrained_prompt_is_drawn_from_torchs_random_state() -> None:
    one, again = made(), made()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    other = new_prompt(form="ssam", template="*", width=6)
    assert not torch.equal(other.matrix, one.matrix)  # type: ignore[arg-type]


def test_settings_make_another_of_the_kind() -> None:
    for settings in ({"rows": 8, "tokens": 2}, {"form": "released"}):
        prompt = made(scale=0.1, base="here", template="* by {artist}", **settings)
        assert prompt.settings["rows"] == settings.get("rows", 1)
        again = new_prompt(**{key: value for key, value in prompt.settings.items() if key != "method"})
        assert again.settings == prompt.settings
        again.load_state_dict(prompt.state_dict())
        assert torch.equal(again(), prompt())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "paper"}, r"^prompt.form: 'paper' is none of ssam, released$"),
        (
            {"form": "released", "tokens": 2},
            r"^prompt.tokens: the released form has a single vector, not 2; set it to 1$",
        ),
        ({"rows": 16, "tokens": 3}, r"^prompt.rows: 16 rows cannot be pooled to 3 tokens; take a multiple$"),
        ({"rows": 2, "tokens": 4}, r"^prompt.rows: 2 rows cannot be pooled to 4 tokens"),
        ({"tokens": 0}, r"^prompt.rows: 16 rows cannot be pooled to 0 tokens"),
        ({"rows": 0}, r"^prompt.rows: 0 rows cannot be pooled to 1 tokens"),
    ],
)
def test_numbers_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(**settings)
