"""The page without its looks: one model in memory, conversations, and what may go wrong in them."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from mmfast.data.samples import Message
from mmfast.generate import ChatSession
from mmfast.generate.decoding import context_length
from mmfast.models import open_model
from mmfast.page.runs import Run

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel

__all__ = ["Answer", "Conversation", "ModelSlot", "Question", "explain", "medium_kind"]

MAX_TEXT = 100_000
"""Characters of a longest question: far beyond any context, and quickly tokenised."""


class ModelSlot:
    """The one model in memory, which serves one conversation at a time.

    Args:
        llm: Folder of the language model, where it has moved since the training.
        encoder: Folder of the encoder, likewise.
    """

    def __init__(self, llm: str | None = None, encoder: str | None = None) -> None:
        self._bases = {"llm": llm, "encoder": encoder}
        # Not one that knows its thread: a stream's pieces may be fetched by several.
        self._lock = threading.Lock()
        self._held: tuple[Run, MultimodalModel] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a model answers or is loaded right now."""
        return self._lock.locked()

    def has(self, run: Run) -> bool:
        """Whether the run's model is in memory."""
        return self._held is not None and self._held[0] == run

    @contextmanager
    def use(self, run: Run) -> Iterator[MultimodalModel]:
        """The run's model, for one conversation alone; loads it, after the former is freed, if it is not there.

        Raises:
            OSError, ValueError: As `open_model`. Then no model is in memory.
        """
        with self._lock:
            if self._held is None or self._held[0] != run:
                self._free()
                model: Any = open_model(run.folder, **self._bases)
                self._held = (run, model.to("cuda") if torch.cuda.is_available() else model)
            yield self._held[1]

    def _free(self) -> None:
        self._held = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load(self, run: Run) -> str:
        """Loads the run's model; returns a line on it."""
        start = time.perf_counter()
        with self.use(run) as model:
            seconds = time.perf_counter() - start
            device = "the GPU" if model.device.type == "cuda" else "the CPU"
            return (
                f"{run.name}: {model.system}, reads text and {_kinds(model)}, {context_length(model):,} tokens of "
                f"context, on {device}, loaded in {seconds:.1f} s"
            )


@dataclass(frozen=True)
class Question:
    """What a person sends: a text, and files by their paths."""

    text: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """How far the answer is: its text so far; when it is over, why nothing of it is kept (None: it is kept)."""

    text: str
    is_over: bool = False
    forgotten: str | None = None


@dataclass
class Conversation:
    """One person's turns with one run. A turn that fails, is stopped or stays empty leaves no trace."""

    run: Run | None = None
    messages: list[Message] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    pending: Question | None = None
    about: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def choose(self, run: Run) -> None:
        """Begins anew with a run."""
        self.run, self.about = run, ""
        self.reset()

    def reset(self) -> None:
        """Forgets all turns, and stops an answer."""
        self.stop()
        self.pending, self.messages, self.questions = None, [], []

    def stop(self) -> None:
        """Ends the answer that another thread makes, or waits to make, after its current token."""
        self._stop.set()

    def ask(self, question: Question) -> None:
        """Takes a question, which `answer` answers.

        Raises:
            ValueError: If there is no run, another question waits for its answer, or the question is empty or too long.
        """
        if self.pending is not None:
            raise ValueError("page: a question is being answered; one at a time is accepted; wait for it, or stop it")
        if self.run is None:
            raise ValueError("page: no run is chosen; choose one above")
        if not question.text.strip() and not question.files:
            raise ValueError("page: the question is empty; write one, or add an image or a video")
        if len(question.text) > MAX_TEXT:
            raise ValueError(
                f"page: the question has {len(question.text):,} characters; {MAX_TEXT:,} are accepted; shorten it"
            )
        # Each question has a stop of its own: one that was stopped may still be ending.
        self.pending, self._stop = question, threading.Event()

    def answer(self, slot: ModelSlot, temperature: float, max_new_tokens: int) -> Iterator[Answer]:
        """Answers the pending question piece by piece; ends without a last `Answer` if `reset` was called meanwhile.

        Raises:
            Exception: What keeps the model from answering; the conversation is as it was.
        """
        question, run, messages, stop = self.pending, self.run, self.messages, self._stop
        if question is None or run is None:
            return
        try:
            with slot.use(run) as model:
                images, videos = _sorted_files(question.files, model, run)
                session = ChatSession(model, temperature=temperature, max_new_tokens=int(max_new_tokens), stop=stop)
                session.messages = list(messages)
                text = ""
                for piece in session.stream(question.text.strip(), images, videos):
                    text += piece
                    yield Answer(text)
            if self.messages is not messages:
                return
            is_kept = len(session.messages) > len(messages)
            if is_kept:
                messages[:] = session.messages
                self.questions.append(question)
            reason = "stopped" if stop.is_set() else "the model answered with nothing"
            yield Answer(text, True, None if is_kept else f"{reason}; this question is forgotten")
        finally:
            if self.pending is question:
                self.pending = None


def _sorted_files(files: Sequence[str], model: MultimodalModel, run: Run) -> tuple[list[str], list[str]]:
    """The images and the videos among files; refuses what the model does not read, before anything is decoded."""
    accepted = getattr(model.processor, "media_kinds", ())
    sorted_files: dict[str, list[str]] = {"image": [], "video": []}
    for file in files:
        kind = medium_kind(Path(file), prefer_video="video" in accepted)
        if kind not in accepted:
            raise ValueError(
                f"page: '{Path(file).name}' is {'an' if kind == 'image' else 'a'} {kind}; {run.name} ({model.system}) "
                f"reads text and {_kinds(model)}; remove the file, or choose a run that reads it"
            )
        sorted_files[kind].append(file)
    return sorted_files["image"], sorted_files["video"]


def _kinds(model: MultimodalModel) -> str:
    return " and ".join(f"{kind}s" for kind in getattr(model.processor, "media_kinds", ())) or "nothing else"


def medium_kind(path: Path, prefer_video: bool = False) -> str:
    """ "image" or "video", by the beginning of the file's content; its name tells nothing.

    Args:
        path: The file.
        prefer_video: Whether an animated picture is a video.

    Raises:
        ValueError: If it is neither.
        ImportError: If it is no image, and PyAV, which reads videos, is missing.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            # Pillow knows the beginning of an MPEG stream, but reads none.
            is_video = image.format == "MPEG" or (prefer_video and getattr(image, "is_animated", False))
            return "video" if is_video else "image"
    except PIL.Image.DecompressionBombError:
        return "image"
    except Exception:
        pass  # decoders raise anything on what is none of theirs
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"page: '{path.name}' is no image; videos are read with PyAV, which is not installed; "
            "pip install mmfast[video]"
        ) from error
    try:
        with path.open("rb") as file, av.open(_Nameless(file), options={"protocol_whitelist": "none"}) as container:
            # FFmpeg knows pictures by their first bytes, also those too broken for Pillow, which will say so.
            if container.format.name.endswith("_pipe"):
                return "image"
            is_video = bool(container.streams.video or container.streams.audio)
    except Exception:
        is_video = False
    if not is_video:
        raise ValueError(
            f"page: '{path.name}' is no image or video by its content; an image that Pillow opens or a video that "
            "PyAV decodes is accepted; send another file"
        )
    return "video"


class _Nameless:
    """A file without a name, by which FFmpeg would guess what it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def explain(error: BaseException, files: Sequence[str] = ()) -> str:
    """What a person is told of an error: our own words as they are, files by their names."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"page: out of memory: {error}; ask with fewer images or words, or begin a new chat"
    elif isinstance(error, ValueError | OSError | ImportError | NotImplementedError):
        text = str(error)
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {error}"
    for file in files:
        for path in (str(Path(file).resolve()), file):
            text = text.replace(path, Path(file).name)
    return text
