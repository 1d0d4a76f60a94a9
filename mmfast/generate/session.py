"""A conversation with a model, its answers as streams of text."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mmfast.data.images import load_image
from mmfast.data.samples import Message, Part, Sample
from mmfast.data.video_processor import FEATURE_FILE
from mmfast.data.videos import load_video
from mmfast.generate.decoding import (
    StopRule,
    check_max_new_tokens,
    context_length,
    decoding_options,
    encode_prompt,
    processor_of,
    to_device,
)
from mmfast.generate.experts import Expert, consult

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel

__all__ = ["ChatSession", "read_image", "read_video"]


class ChatSession:
    """A conversation: every question is answered in view of all earlier turns and their images or videos.

    A turn that fails, is interrupted or has an empty answer leaves no trace in the history. With the template
    `plain`, which knows no conversation, every turn stands alone and needs an image.

    Args:
        model: The model, with its processor. It is put into eval mode.
        temperature: 0 answers greedily; above, tokens are sampled, and the higher the more evenly.
        top_p: Share of the probability mass that sampling chooses from.
        max_new_tokens: Longest answer, in tokens; the end of the model's context also ends it.
        seed: Seed of the sampling; turn n of two sessions with one seed and one history is the same.
        experts: Say something of each image, which the question then has as its input; see `experts.consult`.
        stop: Another thread sets it to end an answer after its current token; as an interrupted turn it is forgotten.

    Raises:
        ValueError: If a number is outside its range.
    """

    def __init__(
        self,
        model: MultimodalModel,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        experts: Mapping[str, Expert] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        check_max_new_tokens(max_new_tokens)
        self.model = model.eval()
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.experts = experts or {}
        self.stop = stop or threading.Event()
        self.messages: list[Message] = []
        self._options = decoding_options(temperature, top_p)
        self._rule = StopRule(model)
        self._processor = processor_of(model)

    def send(
        self,
        text: str,
        images: Sequence[str | Path | Image.Image] = (),
        videos: Sequence[str | Path | Sequence[Image.Image]] = (),
    ) -> str:
        """Asks and returns the whole answer, without surrounding white space.

        Args:
            text: The question.
            images: Images shown with it, before the text: files or PIL images.
            videos: Videos shown with it, after the text: files or sequences of PIL images.

        Raises:
            ValueError: If a medium cannot be read, is of a kind that the model does not read, or the conversation has
                outgrown the model's context.
        """
        return "".join(self.stream(text, images, videos))

    def stream(
        self,
        text: str,
        images: Sequence[str | Path | Image.Image] = (),
        videos: Sequence[str | Path | Sequence[Image.Image]] = (),
    ) -> Iterator[str]:
        """Asks and yields the answer in pieces as it is made; together they are what `send` returns.

        Closing the iterator stops the model after its current token.

        Args:
            text: The question.
            images: Images shown with it, before the text: files or PIL images.
            videos: Videos shown with it, after the text: files or sequences of PIL images.

        Raises:
            ValueError: As `send`. It is raised by this call, before the first piece.
        """
        parts: list[Part] = [{"type": "image", "image": read_image(image)} for image in images]
        parts.append({"type": "text", "text": f"{text}\n" if videos else text})
        # Where Video-ChatGPT has them in its own inference; it trained with them on either side.
        parts += [{"type": "video", "video": read_video(video)} for video in videos]
        asked: Message = {"role": "user", "content": parts}
        question = consult({"id": "chat", "messages": [asked]}, self.experts)["messages"][0]
        captioner = not self._processor.template.keep_question
        if captioner and not images:
            raise ValueError(
                "chat: this model was trained with the template 'plain': it captions images and reads no text; "
                "a question with an image is accepted; add one, or train the next stage"
            )
        sample: Sample = {"id": "chat", "messages": [*([] if captioner else self.messages), question]}
        # A person may name any file, so the folder of all files is the media folder.
        encoded = encode_prompt(self.model, sample, media_folder=Path(os.path.abspath(os.sep)))
        batch = self._processor.collate([encoded], padding_side="left")
        longest = min(self.max_new_tokens, context_length(self.model) - len(encoded.input_ids))
        return self._answer(question, to_device(batch, self.model.device), longest)

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages.clear()

    def _answer(self, question: Message, inputs: dict[str, Tensor], longest: int) -> Iterator[str]:
        ids: list[int] = []
        answer = ""
        for token in self._tokens(inputs, longest):
            ids.append(token)
            text = self._rule.decode(ids).lstrip()
            shown = self._rule.settled(text)
            if len(shown) > len(answer):
                yield shown[len(answer) :]
                answer = shown
        if self.stop.is_set():
            return
        rest = self._rule.decode(ids).strip()
        if len(rest) > len(answer):
            yield rest[len(answer) :]
        if rest:  # an empty answer cannot be part of a conversation
            self.messages += [question, {"role": "assistant", "content": rest}]

    def _tokens(self, inputs: dict[str, Tensor], longest: int) -> Iterator[int]:
        """Runs the model in a thread and yields its tokens; leaving the loop early stops it."""
        tokens: SimpleQueue[int | BaseException | None] = SimpleQueue()
        left = threading.Event()

        def run() -> None:
            try:
                with _seeded(self.seed + len(self.messages), self.model.device, self._options["do_sample"]):
                    self.model.generate(
                        **inputs,
                        **self._options,
                        stopping_criteria=[*self._rule.criteria(), _StopRequest(self.stop, left)],
                        max_new_tokens=longest,
                        streamer=_TokenStreamer(tokens),
                    )
                tokens.put(None)
            except BaseException as error:  # handed to the thread that waits for tokens
                tokens.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (item := tokens.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
            thread.join()


class _TokenStreamer(BaseStreamer):
    """Puts every new token into a queue; the prompt, which comes first and as a matrix, is dropped."""

    def __init__(self, tokens: SimpleQueue[Any]) -> None:
        self._tokens = tokens

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:
            self._tokens.put(int(value[0]))

    def end(self) -> None:
        """Nothing: the thread reports its own end."""


class _StopRequest(StoppingCriteria):
    """Ends the generation when another thread asks for it by one of the events."""

    def __init__(self, *events: threading.Event) -> None:
        self._events = events

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        is_asked = any(event.is_set() for event in self._events)
        return torch.full((len(input_ids),), is_asked, device=input_ids.device)


@contextmanager
def _seeded(seed: int, device: torch.device, active: bool) -> Iterator[None]:
    """Seeds torch inside and leaves its generators as they were; does nothing where nothing is drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=active):
        if active:
            torch.manual_seed(seed)
        yield


def read_image(image: str | Path | Image.Image) -> Image.Image:
    """An image as a question takes it, in RGB.

    Raises:
        ValueError: If the file is missing or is no image.
    """
    if isinstance(image, Image.Image):
        return load_image({"type": "image", "image": image}, None, "chat")
    path = Path(image).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"chat: the image {str(image)!r} is not there; a file that Pillow opens is accepted")
    # A person may name any file, so each file's own folder is its media folder.
    return load_image({"type": "image", "image": path.name}, path.parent, "chat")


def read_video(video: str | Path | Sequence[Image.Image]) -> str | Sequence[Image.Image]:
    """A video as a question takes it: frames as they are, a file by its absolute path, once it could be decoded.

    Raises:
        ValueError: If the file is missing or is no video.
    """
    if not isinstance(video, str | Path):
        return video
    path = Path(video).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"chat: the video {str(video)!r} is not there; a file that PyAV decodes is accepted")
    if path.suffix != FEATURE_FILE:
        load_video({"type": "video", "video": path.name}, path.parent, "chat", num_frames=1)
    return str(path)
