from __future__ import annotations

from typing import Any

import pytest

from mmfast.data import TEMPLATES, ControlPiece, MediaPiece, Piece, Seam, Template, get_template

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = {"type": "image", "image": "a.png"}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*content: Any) -> Any:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in content]}


def assistant(value: str) -> Any:
    return {"role": "assistant", "content": value}


def written(pieces: list[Any], supervised: bool | None = None) -> str:
    """The pieces as one string; only the supervised ones, or only the others, if asked."""
    texts = []
    for piece in pieces:
        if supervised is not None and piece.supervised != supervised:
            continue
        if isinstance(piece, Piece):
            texts.append(piece.text)
        elif isinstance(piece, ControlPiece):
            texts.append({"bos": "<s>", "eos": "</s>"}[piece.token])
        elif isinstance(piece, MediaPiece):
            texts.append("<image>")
        else:
            assert isinstance(piece, Seam)
    return "".join(texts)


CONVERSATION = [user(IMAGE, "Who?"), assistant("Ann."), user("And?"), assistant("Bob.")]


@pytest.mark.parametrize(
    ("name", "expected", "learned"),
    [
        (
            "vicuna_v1",
            VICUNA + " USER: <image>\nWho? ASSISTANT: Ann.</s>USER: And? ASSISTANT: Bob.</s>",
            " Ann.</s> Bob.</s>",
        ),
        (
            "llava_v1",
            VICUNA.replace("user", "human") + " USER: <image>\nWho? ASSISTANT: Ann.</s>USER: And? ASSISTANT: Bob.</s>",
            " Ann.</s> Bob.</s>",
        ),
        ("short", "USER: <image>\nWho? ASSISTANT: Ann.</s>USER: And? ASSISTANT: Bob.</s>", " Ann.</s> Bob.</s>"),
        (
            "llava_llama_2",
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
            "content that the user provides, and assist the user with a variety of tasks using natural language."
            "\n<</SYS>>\n\n<image>\nWho? [/INST] Ann. </s><s>[INST] And? [/INST] Bob. </s>",
            " Ann. </s> Bob. </s>",
        ),
        (
            "lavin",
            "Image: <image>Instruction: Who?\nResponse:Ann.</s>Instruction: And?\nResponse:Bob.</s>",
            "Ann.</s>Bob.</s>",
        ),
        ("lavin_scienceqa", "Image: <image>Who?\nResponse:Ann.</s>And?\nResponse:Bob.</s>", "Ann.</s>Bob.</s>"),
    ],
)
def test_render_writes_the_published_form(name: str, expected: str, learned: str) -> None:
    pieces = get_template(name).render(CONVERSATION)
    assert written(pieces) == expected
    assert written(pieces, supervised=True) == learned


MINIGPT4_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


@pytest.mark.parametrize(
    ("name", "expected", "learned"),
    [
        (
            "minigpt4",
            "###Human: <Img><image></Img> Who? ###Assistant: Ann.###Human: And? ###Assistant: Bob.###",
            "Ann.###Bob.###",
        ),
        (
            "minigpt4_chat",
            MINIGPT4_SYSTEM + "###Human: <Img><image></Img> Who? ###Assistant: Ann.###Human: And? ###Assistant: "
            "Bob.###",
            "Ann.###Bob.###",
        ),
        (
            "minigpt4_llama_2",
            "[INST] <Img><image></Img> Who? [/INST] Ann.</s><s>[INST] And? [/INST] Bob.</s>",
            "Ann.</s>Bob.</s>",
        ),
        (
            "minigpt_v2",
            "[INST] <Img><image></Img> Who? [/INST]Ann.</s><s>[INST] And? [/INST]Bob.</s>",
            "Ann.</s>Bob.</s>",
        ),
    ],
)
def test_render_writes_minigpt4s_form(name: str, expected: str, learned: str) -> None:
    pieces = get_template(name).render(CONVERSATION)
    assert written(pieces) == expected
    assert written(pieces, supervised=True) == learned
    answers = [index for index, piece in enumerate(pieces) if isinstance(piece, Piece) and piece.supervised]
    assert all(isinstance(pieces[index - 1], Seam) for index in answers)


def test_render_llama_2_has_its_own_system_text() -> None:
    begin = written(get_template("llama_2").render(CONVERSATION))
    assert begin.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer")
    assert "while being safe.  Your answers" in begin
    assert "don't share false information.\n<</SYS>>\n\n<image>\nWho? [/INST] Ann. </s>" in begin


def test_render_plain_drops_the_question() -> None:
    template = get_template("plain")
    pieces = template.render([user("Describe:", IMAGE, "please"), assistant("a dog on grass")])
    assert written(pieces) == "<image>a dog on grass\n"
    assert written(pieces, supervised=True) == "a dog on grass\n"
    assert written(template.render([user(IMAGE)], add_generation_prompt=True)) == "<image>"
    system = {"role": "system", "content": "Be brief."}
    assert written(template.render([system, user(IMAGE), assistant("a dog")])) == "<image>a dog\n"
    with pytest.raises(ValueError, match=r"template 'plain': 4 turns; it takes one question and one answer"):
        template.render(CONVERSATION)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE, "Who?"], "<image>\nWho?"),
        ([IMAGE, "\nWho?"], "<image>\nWho?"),
        ([IMAGE, " \n Who?\n"], "<image>\nWho?"),
        (["Who?\n", IMAGE], "Who?\n<image>"),
        (["Who?", IMAGE, "\n"], "Who?<image>"),
        ([IMAGE, IMAGE, "Who?"], "<image><image>\nWho?"),
        (["Is ", IMAGE, " like ", IMAGE, "?"], "Is <image>\nlike <image>\n?"),
        (["Who?\n"], "Who?\n"),
        ([IMAGE], "<image>"),
    ],
)
def test_render_places_images(content: list[Any], expected: str) -> None:
    assert written(get_template("short").render([user(*content)], True)) == f"USER: {expected} ASSISTANT:"


def test_render_puts_all_media_first() -> None:
    template = get_template("lavin")
    messages = [user("Who", IMAGE, " is it?"), assistant("Ann."), user("And ", IMAGE, "?")]
    assert written(template.render(messages, True)) == (
        "Image: <image>Image: <image>Instruction: Who is it?\nResponse:Ann.</s>Instruction: And ?\nResponse:"
    )
    assert written(template.render([user("Who?")], True)) == "Image: N/A Instruction: Who?\nResponse:"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_render_generation_prompt_is_what_comes_before_the_answer(name: str) -> None:
    template = get_template(name)
    turns = CONVERSATION[: 4 if template.keep_question else 2]
    prompt = written(template.render(turns[:-1], add_generation_prompt=True))
    last = turns[-1]["content"]
    rest = written(template.render(turns)).removeprefix(prompt)
    expected = {
        "plain": f"{last}\n",
        "llama_2": f" {last} </s>",
        "llava_llama_2": f" {last} </s>",
        "minigpt4": f"{last}###",
        "minigpt4_chat": f"{last}###",
        "minigpt4_llama_2": f"{last}</s>",
        "minigpt_v2": f"{last}</s>",
        "lavin": f"{last}</s>",
        "lavin_scienceqa": f"{last}</s>",
        "alpaca": f"{last}</s>",
    }
    assert rest == expected.get(name, f" {last}</s>")
    assert prompt == prompt.rstrip() or template.answer_apart


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna_v1", "Be {kind}. USER: Hi ASSISTANT:"),
        ("short", "Be {kind}. USER: Hi ASSISTANT:"),
        ("llama_2", "[INST] <<SYS>>\nBe {kind}.\n<</SYS>>\n\nHi [/INST]"),
    ],
)
def test_render_takes_the_system_text_of_the_conversation(name: str, expected: str) -> None:
    messages = [{"role": "system", "content": "Be {kind}."}, user("Hi")]
    assert written(get_template(name).render(messages, add_generation_prompt=True)) == expected  # type: ignore[arg-type]


def test_render_with_an_empty_system_text() -> None:
    messages = [{"role": "system", "content": ""}, user("Hi")]
    assert written(get_template("vicuna_v1").render(messages, True)) == "USER: Hi ASSISTANT:"  # type: ignore[arg-type]


def test_render_refuses_the_wrong_last_turn() -> None:
    template = get_template("short")
    with pytest.raises(ValueError, match=r"the last turn is of 'user'; expected 'assistant'"):
        template.render(CONVERSATION[:1])
    with pytest.raises(ValueError, match=r"the last turn is of 'assistant'; expected 'user' .*remove the answer"):
        template.render(CONVERSATION, add_generation_prompt=True)


def test_template_refuses_white_space_before_the_answer() -> None:
    with pytest.raises(ValueError, match=r"user_suffix is 'A: '.*move the white space to answer_prefix"):
        Template("mine", user_suffix="A: ")


def test_get_template_lists_names() -> None:
    assert get_template("plain").stop_text == "\n"
    assert get_template("vicuna_v1").stop_text == ""
    with pytest.raises(ValueError, match=r"no template 'v1'; accepted are plain, vicuna_v1, llava_v1, llama_2"):
        get_template("v1")


ALPACA = "Below is an instruction that describes a task"
PAIRED = f"{ALPACA}, paired with an input that provides further context"
REQUEST = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"


def input_part(value: str) -> dict[str, Any]:
    return {**text(value), "is_input": True}


def test_alpaca_with_and_without_input() -> None:
    template = get_template("alpaca")
    pieces = template.render([user("Add."), assistant("3")])
    assert written(pieces) == f"{ALPACA}{REQUEST}Add.\n\n### Response:3</s>"
    assert written(pieces, supervised=True) == "3</s>"
    pieces = template.render([user(input_part("1 2"), "Add."), assistant("3")])
    assert written(pieces) == f"{PAIRED}{REQUEST}Add.\n\n### Input:\n1 2\n\n### Response:3</s>"
    own = template.render([{"role": "system", "content": "Be short."}, user("Add.", input_part("1 2"))], True)
    assert written(own) == "Be short.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"


def test_templates_without_a_place_for_the_input_write_it_on_its_own_line() -> None:
    pieces = get_template("short").render([user(IMAGE, input_part("1 2"), "Add?")], True)
    assert written(pieces) == "USER: <image>\nAdd?\n1 2 ASSISTANT:"
