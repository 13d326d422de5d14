"""The small tokenizer, and learnt vectors in a placeholder's stead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tasks.style_transfer.diffusion.base import Base, quiet
from tasks.style_transfer.diffusion.text import check_template, encode, placeholders, template_text, tokens
from tasks.style_transfer.diffusion.tokenizer import LENGTH, WORDS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
START, END = len(TOKENIZER) - 2, len(TOKENIZER) - 1


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    made = Base("tiny").text_encoder()
    made.requires_grad_(False)
    return made


def number(word: str) -> int:
    (found,) = TOKENIZER(word, add_special_tokens=False).input_ids
    return int(found)


def embeddings(encoder: CLIPTextModel, *words: str) -> Tensor:
    """The text model's own, of words that are one token each: (1, words, width)."""
    return encoder.get_input_embeddings().weight[[number(word) for word in words]][None]


def replaced(encoder: CLIPTextModel, text: str, vectors: Tensor) -> Tensor:
    """A text's encoding with ``vectors`` (1, placeholders, width) in its placeholders' stead."""
    ids = tokens(TOKENIZER, [text])
    return encode(encoder, ids, placeholders(TOKENIZER, ids, vectors.shape[1]), vectors)


def plain(encoder: CLIPTextModel, *texts: str) -> Tensor:
    return encode(encoder, tokens(TOKENIZER, texts))


# The tokenizer.


@pytest.mark.parametrize(
    "word",
    WORDS,
)
def test_a_known_word_is_one_token(word: str) -> None:
    assert TOKENIZER.tokenize(word) == [f"{word}</w>"]
    assert TOKENIZER.tokenize(word.upper()) == [f"{word}</w>"]
    assert TOKENIZER.tokenize(f"a {word} by a {word}")[1::3] == [f"{word}</w>"] * 2


def test_known_words_have_numbers_of_their_own() -> None:
    assert len({*map(number, WORDS), number("*"), START, END}) == len(WORDS) + 3


def test_an_unknown_word_is_taken_letter_by_letter() -> None:
    assert TOKENIZER.tokenize("zoe 42") == ["z", "o", "e</w>", "4</w>", "2</w>"]
    assert TOKENIZER.tokenize("zzz *") == ["z", "z", "z</w>", "*</w>"]


@pytest.mark.parametrize("text", ["zoe", "katsushika hokusai", "42!", "Zoë, 東京 🎨"])
def test_nothing_is_unknown(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert not {START, END} & set(ids)
    assert "".join(TOKENIZER.decode(ids).split()) == "".join(text.lower().split())


def test_saved_and_loaded_it_reads_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    with quiet():
        again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [" ".join(WORDS[start : start + 6]) for start in range(0, len(WORDS), 6)] + [
        "by Zoë, 東京 *",
        "",
        "a " * 40,
    ]
    assert again.model_max_length == LENGTH
    assert len(again) == len(TOKENIZER)
    assert torch.equal(tokens(again, texts), tokens(TOKENIZER, texts))


def test_texts_are_padded_and_cut_off() -> None:
    found = tokens(TOKENIZER, ["", "monet", "a " * 40])
    assert found.shape == (3, LENGTH)
    assert found[0].tolist() == [START, *[END] * (LENGTH - 1)]
    assert found[1].tolist() == [START, number("monet"), *[END] * (LENGTH - 2)]
    assert found[2].tolist() == [START, *[number("a")] * (LENGTH - 2), END]


# Templates.


@pytest.mark.parametrize(
    ("template", "count", "text"),
    [
        ("a painting by {artist} *", 1, "a painting by van gogh *"),
        ("a painting by {artist} *", 3, "a painting by van gogh * * *"),
        ("* in the style of {artist}, {artist}", 2, "* * in the style of van gogh, van gogh"),
        ("*", 1, "*"),
    ],
)
def test_templates(template: str, count: int, text: str) -> None:
    assert template_text(template, "van gogh", count) == text


@pytest.mark.parametrize("template", ["*", "a painting by {artist} *", "in the * style"])
def test_templates_that_will_do(template: str) -> None:
    check_template("x", template)


@pytest.mark.parametrize("template", ["", "a painting", "* *", "a* b", "a painting*", "* and a*", "**"])
def test_templates_that_will_not(template: str) -> None:
    with pytest.raises(ValueError, match=r"^x: '.*' must have one '\*', a word of its own, which the prompt replaces$"):
        check_template("x", template)


def test_where_the_placeholders_are() -> None:
    ids = tokens(TOKENIZER, ["a * by *", "* * monet"])
    found = placeholders(TOKENIZER, ids, 2)
    assert [row.nonzero().flatten().tolist() for row in found] == [[2, 4], [1, 2]]


@pytest.mark.parametrize("text", ["a " * 30 + "*", "a " * 29 + "* *", "a painting"])
def test_placeholders_that_are_cut_off_are_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"^prompt.template: .* 2 placeholders .* more than the 32 tokens"):
        placeholders(TOKENIZER, tokens(TOKENIZER, ["* *", text]), 2)


# Vectors.


def test_vectors_of_known_words_give_what_the_words_give_to_the_bit(encoder: CLIPTextModel) -> None:
    text = "a painting by * in the style of monet"
    for word in ("*", "gogh", "green"):
        found = replaced(encoder, text, embeddings(encoder, word))
        assert torch.equal(found, plain(encoder, text.replace("*", word)))
    assert not torch.allclose(plain(encoder, text), found, atol=1e-2)


def test_two_placeholders_take_their_vectors_in_order(encoder: CLIPTextModel) -> None:
    found = replaced(encoder, "* by the *", embeddings(encoder, "red", "blue"))
    assert torch.equal(found, plain(encoder, "red by the blue"))
    assert not torch.allclose(found, plain(encoder, "blue by the red"), atol=1e-2)


def test_each_text_of_a_batch_has_its_own_and_one_without_a_placeholder_none(encoder: CLIPTextModel) -> None:
    ids = tokens(TOKENIZER, ["a * texture", "", "* portrait"])
    mask = ids == number("*")
    vectors = torch.cat([embeddings(encoder, word) for word in ("red", "blue", "green")])
    wanted = plain(encoder, "a red texture", "", "green portrait")
    assert torch.equal(encode(encoder, ids, mask, vectors), wanted)


def test_only_what_comes_after_a_placeholder_depends_on_it(encoder: CLIPTextModel) -> None:
    one, other = (replaced(encoder, "a dark * texture", torch.randn(1, 1, 64)) for _ in range(2))
    assert torch.equal(one[:, :3], other[:, :3])
    assert (one - other)[0, 3:].abs().amax(1).min() > 0


def test_gradients_reach_the_vectors(encoder: CLIPTextModel) -> None:
    vectors = torch.randn(1, 2, 64, requires_grad=True)
    ids = tokens(TOKENIZER, ["a * by *"])
    encode(encoder, ids, placeholders(TOKENIZER, ids, 2), vectors)[:, :4].square().mean().backward()
    assert vectors.grad is not None
    assert vectors.grad[0, 0].abs().sum() > 0
    assert not vectors.grad[0, 1].any(), "the second stands behind what was asked for"
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_gradient_is_the_slope() -> None:
    """By a difference, in double precision."""
    exact = Base("tiny").text_encoder().double().requires_grad_(False)
    torch.manual_seed(0)
    vectors, step = torch.randn(2, 1, 1, 64, dtype=torch.float64)
    weights = torch.randn(LENGTH, 64, dtype=torch.float64)

    def value(given: Tensor) -> Tensor:
        return (replaced(exact, "a * texture", given) * weights).sum()

    given = vectors.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(given), given)
    difference = (value(vectors + 1e-5 * step) - value(vectors - 1e-5 * step)) / 2e-5
    assert float((slope * step).sum()) == pytest.approx(float(difference), rel=1e-5)


def test_vectors_take_the_text_models_precision(encoder: CLIPTextModel) -> None:
    found = replaced(encoder, "a * texture", embeddings(encoder, "red").double())
    assert torch.equal(found, plain(encoder, "a red texture"))


def test_the_text_model_is_as_before(encoder: CLIPTextModel) -> None:
    hooks: Any = encoder.get_input_embeddings()._forward_hooks
    before = plain(encoder, "a *")
    replaced(encoder, "a *", torch.randn(1, 1, 64))
    assert not hooks
    with pytest.raises(RuntimeError):
        replaced(encoder, "a *", torch.randn(1, 1, 32))
    assert not hooks, "also after an error"
    assert torch.equal(plain(encoder, "a *"), before)
