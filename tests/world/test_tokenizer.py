"""The shipped tokenizer: any text comes back, every digit is one token, offsets point at the text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmfast.world import weights
from mmfast.world.questions import grid
from mmfast.world.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(weights("llm"))


def test_tokenizer_is_fast_and_named(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert (tokenizer.unk_token, tokenizer.model_max_length) == ("<unk>", 512)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)


def test_tokenizer_opens_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("is there a 7?")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("is there a 7?", add_special_tokens=False)["input_ids"] == ids[1:]


def test_tokenizer_finds_special_tokens_in_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize("USER: <image>\nwhat digit is top left? ASSISTANT: 3</s>USER: 4")
    assert tokens[:5] == ["USER", ":", "Ġ", "<image>", "Ċ"]
    assert tokens[-6:] == [":", "Ġ3", "</s>", "USER", ":", "Ġ4"]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


@given(st.text("0123456789 .,:?\nabcxyz"))
@settings(max_examples=200, deadline=None)
def test_tokenizer_keeps_digits_apart(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.tokenize(text)
    digits = [token for token in tokens if any(sign.isdigit() for sign in token)]
    assert [token.removeprefix("Ġ") for token in digits] == [sign for sign in text if sign.isdigit()]


def test_tokenizer_joins_the_space_to_its_digit(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize(grid((3, 7, 1, 4))) == [f"Ġ{digit}" for digit in "3377337711441144"]


@given(st.text(st.characters(codec="ascii")))
@settings(max_examples=200, deadline=None)
def test_tokenizer_offsets_cover_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, max_length=4096
    )
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(pieces) == text
    assert pieces == [tokenizer.decode([token]) for token in encoded["input_ids"]]


def test_tokenizer_is_what_its_script_builds(tokenizer: PreTrainedTokenizerFast) -> None:
    shipped = json.loads((weights("llm") / "tokenizer.json").read_text())
    assert json.loads(build_tokenizer(seed=0).backend_tokenizer.to_str())["model"] == shipped["model"]
