"""Where an answer ends, and what of an unfinished one may be shown."""

from __future__ import annotations

import pytest
import torch

from mmfast.data import get_template
from mmfast.generate import ChatSession
from mmfast.generate.decoding import StopRule
from mmfast.models import Llava


@pytest.fixture
def rule(model: Llava) -> StopRule:
    # One token for the stop text, as Llama's vocabulary has beside "##" and "#".
    model.processor.tokenizer.add_tokens(["###", "##"])
    model.processor.template = get_template("minigpt4")
    return StopRule(model)


@pytest.mark.parametrize("stop", [["###"], ["##", "#"], ["#", "##"], ["#", "#", "#"]])
def test_stop_text_ends_a_row_however_it_is_split(model: Llava, rule: StopRule, stop: list[str]) -> None:
    tokenizer = model.processor.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("a", *stop)]
    (criterion,) = rule.criteria()
    other = [*ids[:-1], ids[0]]
    assert criterion(torch.tensor([ids, other]), torch.empty(0)).tolist() == [True, False]
    assert rule.decode([*ids, ids[0]]) == "a"


@pytest.mark.parametrize(
    ("text", "settled"),
    [("a dog", "a dog"), ("a #", "a"), ("a##", "a"), ("a #1", "a #1"), ("a \n", "a"), ("a \ufffd", ""), ("", "")],
)
def test_settled_is_what_no_later_token_changes(rule: StopRule, text: str, settled: str) -> None:
    assert rule.settled(text) == settled


def test_a_stream_never_shows_a_stop_text_of_several_tokens(model: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    model.processor.template = get_template("minigpt4")
    ids = model.processor.tokenizer.encode("no. #1 dog ###", add_special_tokens=False)
    assert len(ids) > 8  # the stop text is none of the vocabulary's
    session = ChatSession(model)
    monkeypatch.setattr(session, "_tokens", lambda inputs, longest: iter(ids))
    pieces = list(session.stream("what is it?"))
    assert pieces == ["n", "o", ".", " #1", " dog"]
    assert session.messages[-1]["content"] == "no. #1 dog"
