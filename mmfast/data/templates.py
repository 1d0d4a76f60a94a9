"""Conversation templates: a conversation becomes pieces of text that know whether they are supervised.

Labels are made from these pieces while they are tokenised; a rendered string is never taken apart again.
Source of the texts and separators: LLaVA `llava/conversation.py`, `llava/train/train.py` (Apache-2.0); Video-ChatGPT
`video_chatgpt/video_conversation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from mmfast.data.samples import MediaPart, Message, Part, TextPart, content_parts


@dataclass(frozen=True)
class Piece:
    """Text, and whether the model learns to write it. It is text throughout: never a control token."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class ControlPiece:
    """The tokenizer's token for the begin or the end of a text (the begin is left out if it has none)."""

    token: Literal["bos", "eos"]
    supervised: bool


@dataclass(frozen=True)
class MediaPiece:
    """The place of a medium, such as an image; never supervised."""

    part: MediaPart
    supervised: Literal[False] = False


@dataclass(frozen=True)
class Seam:
    """Text before and after it is tokenised apart."""

    supervised: Literal[False] = False


AnyPiece: TypeAlias = Piece | ControlPiece | MediaPiece | Seam


@dataclass(frozen=True)
class Template:
    """How a conversation is written. One turn is

        user_prefix question user_suffix | answer_prefix answer answer_suffix [eos]

    with all after the bar supervised, and generation begins at the bar. So the space before an answer belongs to
    the answer: with the token " 3", or "▁" and "3", the model writes the space itself.

    Args:
        name: what it is asked for by.
        opening: text before everything else.
        system: system text; a system turn in the conversation takes its place.
        system_format: how a non-empty system text is written; it has the field `{system}`.
        system_in_user: the system text stands after the first `user_prefix`, not before it.
        system_with_input: instead of `system` where the first question has an input (see `mmfast.data.samples`).
        input_prefix: text before a question's input, which stands at the end of the question.
        media_prefix: text before every medium, such as "<Img>".
        media_suffix: text after every medium.
        media_separator: what stands between a medium (with its suffix) and text that follows it.
        media_before_turns: all media of the conversation stand before its first turn, wherever in it they are.
        no_media: what a conversation without media begins with.
        keep_question: False drops the text of the question (and the system text) and keeps the media; there is
            one question then.
        answer_apart: the answer is tokenised apart from the prompt, which may end in white space then.
        eos: every answer ends with the tokenizer's end-of-text token.
        bos_between: every turn but the first begins with the tokenizer's begin-of-text token.
        stop_text: text that ends generation, as the end-of-text token does.

    Raises:
        ValueError: `user_suffix` ends in white space, which tokenizers join to the answer's first token.
    """

    name: str
    opening: str = ""
    system: str = ""
    system_format: str = "{system} "
    system_in_user: bool = False
    system_with_input: str = ""
    input_prefix: str = "\n"
    user_prefix: str = "USER: "
    user_suffix: str = " ASSISTANT:"
    answer_prefix: str = " "
    answer_suffix: str = ""
    media_prefix: str = ""
    media_suffix: str = ""
    media_separator: str = "\n"
    media_before_turns: bool = False
    no_media: str = ""
    keep_question: bool = True
    answer_apart: bool = False
    eos: bool = True
    bos_between: bool = False
    stop_text: str = ""

    def __post_init__(self) -> None:
        if self.user_suffix != self.user_suffix.rstrip() and not self.answer_apart:
            raise ValueError(
                f"template '{self.name}': user_suffix is {self.user_suffix!r}; it must not end in white space, which "
                "would be part of the answer's first token; move the white space to answer_prefix, or set answer_apart"
            )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[AnyPiece]:
        """The pieces of a conversation.

        A medium followed by text is written medium, `media_separator`, text; of that text, the white space at its
        begin and at the end of the turn is left out.

        Args:
            messages: an optional system turn, then user and assistant in turn (see `validate_sample`).
            add_generation_prompt: the conversation ends with a question, and the pieces where the answer begins.

        Raises:
            ValueError: the last turn is not the assistant's (the user's if `add_generation_prompt`), or a template
                without questions gets several.
        """
        last, expected = messages[-1]["role"], "user" if add_generation_prompt else "assistant"
        if last != expected:
            raise ValueError(
                f"template '{self.name}': the last turn is of '{last}'; expected '{expected}' with "
                f"add_generation_prompt={add_generation_prompt}; "
                + ("remove the answer" if add_generation_prompt else "remove the question without an answer")
            )
        question = messages[messages[0]["role"] == "system"]
        system = (_has_input(question) and self.system_with_input) or self.system
        if messages[0]["role"] == "system":
            system, messages = _text(messages[0]), messages[1:]
        if not self.keep_question and len(messages) > 2:
            raise ValueError(
                f"template '{self.name}': {len(messages)} turns; it takes one question and one answer; use another "
                f"template for conversations ({', '.join(n for n, t in TEMPLATES.items() if t.keep_question)})"
            )
        head = self.system_format.format(system=system) if system and self.keep_question else ""
        pieces: list[AnyPiece] = [Piece(self.opening, supervised=False)] if self.keep_question else []
        pieces += self._before(messages)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                pieces += [Seam()] if self.answer_apart else []
                answer = self.answer_prefix + _text(message) + self.answer_suffix
                pieces.append(Piece(answer, supervised=True))
                if self.eos:
                    pieces.append(ControlPiece("eos", supervised=True))
                continue
            if index > 0 and self.bos_between:
                pieces.append(ControlPiece("bos", supervised=False))
            prefix = self.user_prefix
            if index == 0:
                prefix = prefix + head if self.system_in_user else head + prefix
            pieces += [Piece(prefix, supervised=False), *self._question(message)]
            pieces.append(Piece(self.user_suffix, supervised=False))
        return [piece for piece in pieces if not isinstance(piece, Piece) or piece.text]

    def _before(self, messages: Sequence[Message]) -> list[AnyPiece]:
        """What stands before the first turn."""
        media = [part for message in messages for part in content_parts(message) if part["type"] != "text"]
        if not media:
            return [Piece(self.no_media, supervised=False)]
        return [piece for part in media for piece in self._medium(part)] if self.media_before_turns else []

    def _medium(self, part: MediaPart) -> list[AnyPiece]:
        before, after = Piece(self.media_prefix, supervised=False), Piece(self.media_suffix, supervised=False)
        return [before, MediaPiece(part), after]

    def _question(self, message: Message) -> list[AnyPiece]:
        parts = sorted(content_parts(message), key=_is_input)
        if self.media_before_turns:
            parts = [part for part in parts if part["type"] == "text"]
        pieces: list[AnyPiece] = []
        after_media = False
        for index, part in enumerate(parts):
            if part["type"] != "text":
                pieces += self._medium(part)
                after_media = True
            elif self.keep_question and _is_input(part):
                pieces.append(Piece(self.input_prefix + part["text"], supervised=False))
            elif self.keep_question:
                text = part["text"]
                if after_media:
                    text = text.lstrip()
                    text = self.media_separator + text if text else ""
                    text = text.rstrip() if index == len(parts) - 1 else text
                pieces.append(Piece(text, supervised=False))
                after_media = after_media and not text
        return pieces


def _is_input(part: Part) -> bool:
    return part["type"] == "text" and part.get("is_input", False)


def _has_input(message: Message) -> bool:
    return any(_is_input(part) for part in content_parts(message))


def _text(message: Message) -> str:
    return "".join(cast(TextPart, part)["text"] for part in content_parts(message))


_USER_AND_ASSISTANT = (
    "A chat between a curious {user} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
)

_ALPACA = "Below is an instruction that describes a {what}. Write a response that appropriately completes the request."

_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


# The missing space between two of the sentences is the original's.
_VIDEO_CHATGPT_SYSTEM = (
    "You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content that the "
    "user provides, and assist the user with a variety of tasks using natural language.Follow the instructions "
    "carefully and explain your answers in detail based on the provided video."
)


def _llama_2(name: str, system: str) -> Template:
    return Template(
        name,
        system=system,
        system_format="<<SYS>>\n{system}\n<</SYS>>\n\n",
        system_in_user=True,
        user_prefix="[INST] ",
        user_suffix=" [/INST]",
        answer_suffix=" ",
        bos_between=True,
    )


# Source: Vision-CAIR/MiniGPT-4 `minigpt4/conversation/conversation.py`, `minigpt4/models/minigpt_base.py`,
# `train_configs/` (BSD-3-Clause). Its demo writes no space before `###Assistant:`; its training does, and so do these.
_MINIGPT4_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


def _minigpt4(name: str, **settings: str) -> Template:
    return Template(
        name,
        user_prefix="Human: ",
        user_suffix=" ###Assistant: ",
        answer_prefix="",
        answer_suffix="###",
        media_prefix="<Img>",
        media_suffix="</Img>",
        media_separator=" ",
        answer_apart=True,
        eos=False,
        stop_text="###",
        **settings,  # type: ignore[arg-type]
    )


def _minigpt4_llama_2(name: str, user_suffix: str) -> Template:
    return Template(
        name,
        user_prefix="[INST] ",
        user_suffix=user_suffix,
        answer_prefix="",
        media_prefix="<Img>",
        media_suffix="</Img>",
        media_separator=" ",
        answer_apart=True,
        bos_between=True,
    )


def _lavin(name: str, user_prefix: str) -> Template:
    return Template(
        name,
        user_prefix=user_prefix,
        user_suffix="\nResponse:",
        answer_prefix="",
        media_prefix="Image: ",
        media_before_turns=True,
        no_media="Image: N/A ",
    )


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            "plain",
            user_prefix="",
            user_suffix="",
            answer_prefix="",
            answer_suffix="\n",
            keep_question=False,
            eos=False,
            stop_text="\n",
        ),
        Template("vicuna_v1", system=_USER_AND_ASSISTANT.format(user="user")),
        Template("llava_v1", system=_USER_AND_ASSISTANT.format(user="human")),
        _llama_2("llama_2", _LLAMA_2_SYSTEM),
        _llama_2("llava_llama_2", _LLAVA_LLAMA_2_SYSTEM),
        Template("video-chatgpt_v1", system=_VIDEO_CHATGPT_SYSTEM),
        Template("short"),
        Template(
            "alpaca",
            system=_ALPACA.format(what="task"),
            system_with_input=_ALPACA.format(what="task, paired with an input that provides further context"),
            system_format="{system}\n\n",
            user_prefix="### Instruction:\n",
            input_prefix="\n\n### Input:\n",
            user_suffix="\n\n### Response:",
            answer_prefix="",
        ),
        _minigpt4("minigpt4", opening="###"),
        _minigpt4("minigpt4_chat", system=_MINIGPT4_SYSTEM, system_format="{system}###"),
        _minigpt4_llama_2("minigpt4_llama_2", user_suffix=" [/INST] "),
        _minigpt4_llama_2("minigpt_v2", user_suffix=" [/INST]"),
        _lavin("lavin", "Instruction: "),
        _lavin("lavin_scienceqa", ""),
    )
}
"""The templates by name. `plain` is that of the alignment stage: images, caption, newline. `llava_v1` says "human"
where `vicuna_v1` says "user"; LLaVA trains and evaluates with the latter. Video-ChatGPT trains with `vicuna_v1` and
asks with `video-chatgpt_v1`. `short` is `vicuna_v1` without a system X is what
MiniGPT-4's second stage trains with on Vicuna, `minigpt4_chat` the same with the system text of its demo;
`minigpt4_llama_2` and `minigpt_v2` are the forms on LLaMA-2. `lavin` is LaVIN's for instructions, `lavin_scienceqa`
that for questions which say what their parts are, as `mmfast.data.scienceqa` writes them; the space after "N/A" is the
one that SentencePiece puts before the text, which LaVIN tokenises apart (LaVIN `engine.py`, `util/base_prompt.py`,
`tools/data_processing.py`)."""


def get_template(name: str) -> Template:
    """The template called `name`.

    Raises:
        ValueError: no such template; lists the names.
    """
    if name not in TEMPLATES:
        raise ValueError(f"get_template: no template '{name}'; accepted are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
