"""`mmfast chat`: a conversation in the terminal, by keyboard, pipe or option."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmfast.generate.session import ChatSession

__all__ = ["chat"]

HELP = "/image PATH and /video PATH add to the next question, /reset forgets everything, /quit leaves."


def chat(
    run: str,
    image: list[str] | str = (),  # type: ignore[assignment]  # an empty list would be shared between calls
    prompt: list[str] | str = (),  # type: ignore[assignment]
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ocr: bool = False,
    llm: str | None = None,
    encoder: str | None = None,
    video: list[str] | str = (),  # type: ignore[assignment]
) -> None:
    """Talks with a trained model in the terminal.

    Questions come from `prompt`, else from the keyboard, else line by line from a pipe. /image PATH and /video PATH
    add to the next question, /reset forgets everything, /quit leaves. Ctrl-C stops an answer; at an empty prompt it
    leaves, as the end of the input does.

    Args:
        run: A run folder, or a folder with a saved or exported model.
        image: Image shown with the first question. Several: --image+ a.jpg --image+ b.jpg.
        prompt: Question to answer, then leave. Several: --prompt+ "..." --prompt+ "...".
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 answers greedily; above, tokens are sampled, and the higher the more evenly.
        top_p: Share of the probability mass that sampling chooses from.
        seed: Seed of the sampling.
        ocr: Whether Tesseract reads each image and the question gets what it reads.
        llm: Folder of the language model, where it has moved since the training.
        encoder: Folder of the encoder, where it has moved since the training.
        video: Video shown with the first question. Several: --video+ a.mp4 --video+ b.mp4.
    """
    import torch

    from mmfast.generate.experts import TesseractOcr
    from mmfast.generate.session import ChatSession, read_image, read_video
    from mmfast.models import open_model

    # Media first: a wrong path shows before minutes are spent on loading a model.
    images = [read_image(path) for path in ([image] if isinstance(image, str) else image)]
    videos = [read_video(path) for path in ([video] if isinstance(video, str) else video)]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    experts = {"OCR": TesseractOcr()} if ocr else {}
    model: Any = open_model(run, llm=llm, encoder=encoder)
    if torch.cuda.is_available():
        model = model.to("cuda")
    session = ChatSession(
        model, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed, experts=experts
    )
    terminal = _Terminal(session, images, videos, interactive=not prompts and sys.stdin.isatty())
    try:
        terminal.run(prompts or _typed(terminal.interactive))
    except KeyboardInterrupt:
        print()


def _typed(interactive: bool) -> Iterator[str]:
    """Lines from the keyboard or the pipe, until the input ends."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() a line editor and a history
        print(HELP)
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return


class _Terminal:
    """Carries out lines: commands and questions. Errors end it unless a person sits in front."""

    def __init__(self, session: ChatSession, images: list[Image], videos: list[Any], interactive: bool) -> None:
        self.session = session
        self.images = images
        self.videos = videos
        self.interactive = interactive

    def run(self, lines: Iterable[str]) -> None:
        for line in lines:
            words = line.strip()
            if words in ("/quit", "/exit"):
                return
            if not words:
                continue
            try:
                self.obey(words) if words.startswith("/") else self.ask(words)
            except ValueError as error:
                if not self.interactive:
                    raise
                print(error, file=sys.stderr)

    def obey(self, words: str) -> None:
        command, _, argument = words.partition(" ")
        path = argument.strip().strip("'\"")
        if command in ("/image", "/video") and path:
            from mmfast.generate.session import read_image, read_video

            if command == "/image":
                self.images.append(read_image(path))
            else:
                self.videos.append(read_video(path))
        elif command == "/reset":
            self.session.reset()
            self.images.clear()
            self.videos.clear()
        elif command == "/help" or self.interactive:
            print(HELP)
        else:
            raise ValueError(f"chat: the command is {words!r}; accepted are /image PATH, /video PATH, /reset and /quit")

    def ask(self, question: str) -> None:
        try:
            for piece in self.session.stream(question, self.images, self.videos):
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print(" (stopped; this question is forgotten)")
            return
        self.images.clear()
        self.videos.clear()
