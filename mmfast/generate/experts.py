"""Expert systems at inference: what captioners or readers say of an image stands in the question as its input.

Source: Gao et al., "LLaMA-Adapter V2" (arXiv 2304.15010), section 4.4 and figures 8 and 9: nothing is trained with the
experts. The paper does not say where their text stands; the input of an instruction is its natural place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from mmfast.data.images import load_image
from mmfast.data.samples import Message, Part, Sample, content_parts

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Expert", "TesseractOcr", "consult"]

Expert: TypeAlias = "Callable[[Image], str]"
"""Says something of an RGB image, or nothing ("")."""


def consult(sample: Sample, experts: Mapping[str, Expert], media_folder: str | Path | None = None) -> Sample:
    """The sample with what the experts say of its images as input of the questions that show them.

    Each says one line, or several, in the form `[<name> expert: <what it says>]`; an input that is there already comes
    first.

    Args:
        sample: Its user turns may hold images; it is left as it is.
        experts: By their names, such as "Caption" or "OCR".
        media_folder: Folder to which image paths are relative.

    Raises:
        ValueError: If an image cannot be read.
    """
    messages = [_consult(message, experts, media_folder, sample["id"]) for message in sample["messages"]]
    return cast(Sample, {**sample, "messages": messages})


def _consult(message: Message, experts: Mapping[str, Expert], folder: str | Path | None, sample_id: str) -> Message:
    parts: list[Any] = content_parts(message)
    images = [load_image(part, folder, sample_id) for part in parts if part["type"] == "image"]
    said = [(name, expert(image).strip()) for image in images for name, expert in experts.items()]
    lines = [f"[{name} expert: {text}]" for name, text in said if text]
    if not lines:
        return message
    given = [part for part in parts if part.get("is_input")]
    text = "\n".join([*(part["text"] for part in given), *lines])
    kept: list[Part] = [part for part in parts if part not in given]
    return {"role": message["role"], "content": [*kept, {"type": "text", "text": text, "is_input": True}]}


class TesseractOcr:
    """An expert that reads the text in an image with Tesseract, as numbered lines.

    Args:
        language: Tesseract's name of the language, or several joined by "+".

    Raises:
        ImportError: If the package pytesseract is missing.
        RuntimeError: If the program tesseract is missing, or does not know the language.
    """

    def __init__(self, language: str = "eng") -> None:
        try:
            import pytesseract
        except ImportError as error:
            raise ImportError("TesseractOcr: the package pytesseract is missing; pip install 'mmfast[ocr]'") from error
        try:
            known = pytesseract.get_languages()
        except pytesseract.TesseractNotFoundError as error:
            raise RuntimeError(
                "TesseractOcr: the program tesseract is not installed; on Debian and Ubuntu: apt install tesseract-ocr"
            ) from error
        missing = [name for name in language.split("+") if name not in known]
        if missing:
            raise RuntimeError(
                f"TesseractOcr: Tesseract does not know the language {', '.join(missing)}; {', '.join(sorted(known))} "
                f"are accepted; on Debian and Ubuntu: apt install tesseract-ocr-{missing[0]}"
            )
        self.language = language
        self._read = pytesseract.image_to_string

    def __call__(self, image: Image) -> str:
        """The lines of text, numbered from 1; "" if there is none."""
        lines = [line.strip() for line in self._read(image, lang=self.language).splitlines() if line.strip()]
        return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
