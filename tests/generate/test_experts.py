"""Expert systems: what they say of an image enters the question's input, in samples and in a chat."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from mmfast.data import get_template
from mmfast.generate import ChatSession, TesseractOcr, consult
from mmfast.models import Llava

RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("L", (8, 8), 30)


def colour(image: Image.Image) -> str:
    assert image.mode == "RGB"
    return "red " if image.getpixel((0, 0)) == (255, 0, 0) else "dark"


def sample(*content: Any) -> Any:
    return {"id": "one", "messages": [{"role": "user", "content": list(content)}], "kind": "k"}


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def test_what_experts_say_is_the_input(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    images = [{"type": "image", "image": "a.png"}, {"type": "image", "image": BLUE}]
    asked = sample(*images, part("What?"), part("by hand", is_input=True))
    experts = {"Caption": colour, "OCR": lambda image: "", "Size": lambda image: str(image.width)}
    found = consult(asked, experts, tmp_path)
    said = "by hand\n[Caption expert: red]\n[Size expert: 8]\n[Caption expert: dark]\n[Size expert: 8]"
    assert found["messages"][0]["content"] == [*images, part("What?"), part(said, is_input=True)]
    assert found["kind"] == "k" and asked["messages"][0]["content"][3] == part("by hand", is_input=True)
    rendered = get_template("alpaca").render(found["messages"], add_generation_prompt=True)
    assert any(getattr(piece, "text", "") == f"\n\n### Input:\n{said}" for piece in rendered)


def test_without_images_or_words_nothing_changes() -> None:
    for asked in (sample(part("What?")), sample({"type": "image", "image": RED}, part("What?"))):
        assert consult(asked, {"OCR": lambda image: " "}) == asked
    with pytest.raises(ValueError, match="'one'"):
        consult(sample({"type": "image", "image": "no.png"}), {"Caption": colour}, Path("/nowhere"))


def test_chat_with_experts(model: Llava) -> None:
    session = ChatSession(model, max_new_tokens=6, experts={"Caption": colour})
    answer = session.send("what is it?", [RED])
    by_hand = ChatSession(model, max_new_tokens=6)
    assert answer == by_hand.send("what is it?\n[Caption expert: red]", [RED])
    assert session.messages[0]["content"][-1] == part("[Caption expert: red]", is_input=True)


def test_missing_package_and_program_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "pytesseract":
            raise ImportError(name)
        return imported(name, *args, **options)

    with monkeypatch.context() as context:
        context.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"pip install 'mmfast\[ocr\]'"):
            TesseractOcr()
    pytesseract = pytest.importorskip("pytesseract")
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(RuntimeError, match="apt install tesseract-ocr"):
        TesseractOcr()


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")
def test_tesseract_reads() -> None:
    pytest.importorskip("pytesseract")
    image = Image.new("RGB", (640, 240), "white")
    font = ImageFont.load_default(size=60)
    ImageDraw.Draw(image).multiline_text((30, 20), "HELLO WORLD\nROOM 407", "black", font=font, spacing=30)
    assert TesseractOcr()(image) == "1. HELLO WORLD\n2. ROOM 407"
    assert TesseractOcr()(Image.new("RGB", (200, 100), "white")) == ""
    with pytest.raises(RuntimeError, match="does not know the language xx"):
        TesseractOcr("xx")
