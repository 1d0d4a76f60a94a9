"""Runs, the one model in memory, conversations and the handlers of the page, without a browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmfast.generate import ChatSession
from mmfast.models import Llava, VideoChatGpt, open_model
from mmfast.page import chat as page_chat
from mmfast.page.app import Page
from mmfast.page.chat import Conversation, ModelSlot, Question, explain, medium_kind
from mmfast.page.runs import Run, find_runs, named_runs

av = pytest.importorskip("av")
LONG = 400


@pytest.fixture
def run(runs: Path) -> Run:
    return named_runs([str(runs / "tiny")])[0]


@pytest.fixture(scope="module")
def slot() -> ModelSlot:
    """One for most tests, so that models are not loaded in each."""
    return ModelSlot()


@pytest.fixture
def red(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), (255, 0, 0)).save(path)
    return str(path)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for grey in range(0, 250, 50):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (grey,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def answered(conversation: Conversation, slot: ModelSlot, question: Question, longest: int = 8) -> list[Any]:
    conversation.ask(question)
    return list(conversation.answer(slot, 0.0, longest))


def test_runs_are_found_by_their_folders_the_newest_first(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tiny", tmp_path / "a" / "run")
    shutil.copytree(runs / "tiny" / "model", tmp_path / "a" / "run" / "best")
    shutil.copytree(runs / "digits" / "model", tmp_path / ".tmp-old-b")
    broken = tmp_path / "newer" / "mmfast.json"
    broken.parent.mkdir()
    broken.write_text(json.dumps({"format": 99}))
    found = find_runs(tmp_path)
    assert found[0].name == "newer"
    assert sorted(run.name for run in found) == ["a/run", "a/run/best", "newer"]
    assert all(" · llava · 20" in run.label for run in found[1:])
    assert "format 99" in found[0].label
    assert not any(run.is_world for run in found)
    assert [run.is_world for run in find_runs(runs / "digits")] == [True]
    for run in found[1:]:
        open_model(run.folder)


def test_a_folder_that_is_named_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no trained model.*mmfast quickstart"):
        named_runs([str(tmp_path)])


def test_a_conversation_is_that_of_a_chat_session(slot: ModelSlot, runs: Path, run: Run, red: str) -> None:
    session = ChatSession(open_model(run.folder), max_new_tokens=8)
    expected = [session.send("what is it?", [red]), session.send("and the dog?")]
    conversation = Conversation(run)
    first = answered(conversation, slot, Question("what is it?", (red,)))
    assert [len(answer.text) for answer in first] == sorted(len(answer.text) for answer in first)
    second = answered(conversation, slot, Question("and the dog?"))
    assert [first[-1].text, second[-1].text] == expected
    assert [message["content"] for message in conversation.messages[1::2]] == expected
    conversation.reset()
    assert answered(conversation, slot, Question("what is it?", (red,)))[-1].text == expected[0]


def test_one_model_is_in_memory_and_a_conversation_gets_its_own_back(
    slot: ModelSlot, runs: Path, run: Run, red: str
) -> None:
    conversation = Conversation(run)
    expected = answered(conversation, slot, Question("it?", (red,)))[-1].text
    (world,) = find_runs(runs / "digits")
    assert "reads text and images, 512 tokens of context, on the CPU" in slot.load(world)
    assert slot.has(world) and not slot.has(run)
    conversation.reset()
    assert answered(conversation, slot, Question("it?", (red,)))[-1].text == expected
    assert slot.has(run) and not slot.has(world)


def test_a_run_without_its_base_tells_so_and_leaves_no_model(
    slot: ModelSlot, tmp_path: Path, runs: Path, run: Run
) -> None:
    folder = shutil.copytree(runs / "tiny", tmp_path / "moved")
    file = folder / "model" / "mmfast.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "llm": "/nowhere/llm"}))
    (moved,) = find_runs(tmp_path)
    slot.load(run)
    with pytest.raises(FileNotFoundError, match="trained on the llm '/nowhere/llm', which is not there"):
        slot.load(moved)
    assert not slot.has(run) and not slot.is_busy


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.png", b"\x89PNG\r\n\x1a\n" + bytes(50), r"cannot read image 'broken\.png'"),
        ("notes.png", b"only words", r"'notes\.png' is no image or video by its content"),
        ("code.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "is no image or video by its content"),
        ("bomb.png", None, r"cannot read image 'bomb\.png': DecompressionBombError"),
    ],
    ids=["broken", "no medium", "tensors", "bomb"],
)
def test_a_bad_file_is_named_and_changes_nothing(
    slot: ModelSlot, run: Run, red: str, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "uploads" / name
    file.parent.mkdir()
    if content is None:
        Image.new("1", (20_000, 20_000)).save(file)
    else:
        file.write_bytes(content)
    conversation = Conversation(run)
    before = answered(conversation, slot, Question("it?", (red,)))[-1].text
    messages = list(conversation.messages)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its words are looked at below
        answered(conversation, slot, Question("and this?", (str(file),)))
    told = explain(caught.value, [str(file)])
    assert re.search(message, told), told
    assert str(tmp_path) not in told
    assert conversation.messages == messages and not slot.is_busy
    conversation.reset()
    assert answered(conversation, slot, Question("it?", (red,)))[-1].text == before


def test_what_a_system_does_not_read_is_refused_before_it_is_decoded(
    slot: ModelSlot, run: Run, red: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_chat.ChatSession, "stream", lambda *args: pytest.fail("it was asked"))
    with pytest.raises(ValueError, match=r"'clip\.mp4' is a video; .*tiny \(llava\) reads text and images"):
        answered(Conversation(run), slot, Question("what?", (clip,)))
    VideoChatGpt.from_parts("world", "world").save_trained(tmp_path / "clips")
    (clips,) = find_runs(tmp_path / "clips")
    with pytest.raises(ValueError, match=r"'red\.png' is an image; .*reads text and videos"):
        answered(Conversation(clips), slot, Question("what?", (red,)))


def test_the_content_tells_what_a_file_is(red: str, clip: str, tmp_path: Path) -> None:
    for file, name, kind in ((red, "a.mp4", "image"), (clip, "b.png", "video")):
        assert medium_kind(Path(shutil.copy(file, tmp_path / name))) == kind
    animated = tmp_path / "c.gif"
    images = [Image.new("L", (8, 8), grey) for grey in (0, 100, 200)]
    images[0].save(animated, save_all=True, append_images=images[1:])
    assert [medium_kind(animated, prefer_video=prefer) for prefer in (False, True)] == ["image", "video"]


def test_more_images_than_the_context_holds_are_refused(slot: ModelSlot, run: Run, red: str) -> None:
    conversation = Conversation(run)
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens, but the model's context of 512"):
        answered(conversation, slot, Question("what?", (red,) * 200))
    assert conversation.messages == [] and conversation.pending is None


def test_stop_ends_the_answer_and_forgets_the_question(slot: ModelSlot, run: Run) -> None:
    conversation = Conversation(run)
    conversation.ask(Question("it?"))
    stream = conversation.answer(slot, 0.0, LONG)
    next(stream)
    conversation.stop()
    *_, last = stream
    assert last.is_over and last.forgotten == "stopped; this question is forgotten"
    assert len(last.text) < LONG / 2
    assert (conversation.messages, conversation.pending, slot.is_busy) == ([], None, False)


def test_a_closed_page_gives_the_model_back(slot: ModelSlot, run: Run) -> None:
    conversation = Conversation(run)
    conversation.ask(Question("it?"))
    stream: Any = conversation.answer(slot, 0.0, LONG)
    next(stream)
    assert slot.is_busy
    stream.close()
    assert not slot.is_busy and conversation.messages == []


def test_a_new_chat_ends_the_old_answer_and_not_the_new_one(slot: ModelSlot, run: Run) -> None:
    conversation = Conversation(run)
    conversation.ask(Question("it?"))
    old = conversation.answer(slot, 0.0, LONG)
    next(old)
    conversation.reset()
    conversation.ask(Question("and now?"))
    assert not any(answer.is_over for answer in old)
    assert conversation.pending == Question("and now?")
    assert list(conversation.answer(slot, 0.0, 8))[-1].forgotten is None
    assert len(conversation.messages) == 2


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("  "), "the question is empty"),
        (Question("a" * 100_001), "100,001 characters; 100,000 are accepted"),
    ],
)
def test_an_empty_or_endless_question_is_refused(run: Run, question: Question, message: str) -> None:
    conversation = Conversation(run)
    with pytest.raises(ValueError, match=message):
        conversation.ask(question)
    assert conversation.pending is None


def test_questions_need_a_run_and_come_one_at_a_time(run: Run) -> None:
    with pytest.raises(ValueError, match="no run is chosen"):
        Conversation().ask(Question("it?"))
    conversation = Conversation(run)
    conversation.ask(Question("it?"))
    with pytest.raises(ValueError, match="a question is being answered"):
        conversation.ask(Question("it?"))


def test_errors_are_told_in_our_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(torch.OutOfMemoryError("tried 1 GiB")).startswith("page: out of memory: tried 1 GiB; ask with fewer")
    assert explain(ValueError("as it is")) == "as it is"
    assert capsys.readouterr().err == ""
    assert explain(KeyError("x")) == "KeyError: 'x'"
    assert "KeyError" in capsys.readouterr().err  # for the one who has to mend it


def texts(view: Any) -> list[str]:
    return [part for message in view[0] for part in message["content"] if isinstance(part, str)]


@pytest.fixture
def page(slot: ModelSlot, runs: Path, tmp_path: Path) -> Iterator[tuple[Page, str]]:
    page = Page(lambda: find_runs(runs), slot, tmp_path)
    page.build()
    key, _ = page.begin()
    *_, view = page.choose(key, str(runs / "tiny"))
    assert "tiny: llava, reads text and images" in view[2]
    yield page, key
    page.forget(key)


def test_the_page_streams_and_escapes(page: tuple[Page, str], monkeypatch: pytest.MonkeyPatch) -> None:
    page_, key = page

    def stream(self: ChatSession, text: str, images: Any, videos: Any) -> Iterator[str]:
        for piece in ("<img src=x ", "onerror=alert(1)> ", "![](http://example.com/x.png)"):
            time.sleep(0.15)
            yield piece
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "<b>&</b>"}]

    monkeypatch.setattr(ChatSession, "stream", stream)
    assert texts(page_.send(key, {"text": "<i>?</i>", "files": []})) == ["&lt;i&gt;?&lt;/i&gt;"]
    views = list(page_.answer(key, 0.0, 8))
    answer = "&lt;img src=x onerror=alert(1)&gt; ![](http://example.com/x.png)"
    assert [texts(view)[1] for view in views[:3]] == [answer[:14], answer[:35], answer]
    assert texts(views[-1]) == ["&lt;i&gt;?&lt;/i&gt;", "&lt;b&gt;&amp;&lt;/b&gt;"]


def test_an_error_comes_into_the_box_with_the_question_back(page: tuple[Page, str], tmp_path: Path) -> None:
    page_, key = page
    file = tmp_path / "<b>.png"
    file.write_bytes(b"words")
    page_.send(key, {"text": "what?", "files": [str(file)]})
    *_, view = page_.answer(key, 0.0, 8)
    assert view[0] == []
    assert (view[1].value["text"], len(view[1].value["files"])) == ("what?", 1)
    assert "&lt;b&gt;.png" in view[3].value and "<b>" not in view[3].value
    page_.send(key, {"text": "what?", "files": []})
    *_, view = page_.answer(key, 0.0, 8)
    assert len(view[0]) == 2 and not view[3].visible


def test_a_busy_model_is_said_to_be_busy(page: tuple[Page, str], runs: Path) -> None:
    page_, key = page
    other, _ = page_.begin()
    list(page_.choose(other, str(runs / "tiny")))
    page_.send(key, {"text": "first", "files": []})
    answering = page_.answer(key, 0.0, LONG)
    next(answering)
    assert "Busy" in page_.send(other, {"text": "second", "files": []})[2]
    waiting = threading.Thread(target=lambda: list(page_.answer(other, 0.0, 4)))
    waiting.start()
    page_.stop(key)
    list(answering)
    waiting.join(timeout=30)
    assert not waiting.is_alive()


def test_examples_are_of_the_world_and_of_the_kind_that_is_read(page: tuple[Page, str], runs: Path) -> None:
    page_, key = page
    *_, view = page_.choose(key, str(runs / "digits"))
    assert all(button.visible for button in view[5:])
    example = page_.example(key, 0)
    assert Image.open(example["files"][0]).size == (32, 32)
    assert example["text"] == view[5].value
    *_, view = page_.choose(key, str(runs / "tiny"))
    assert not any(button.visible for button in view[5:])


def test_the_template_of_captions_needs_an_image(
    slot: ModelSlot, tmp_path: Path, tiny_llm: Path, tiny_clip: Path, red: str
) -> None:
    Llava.from_parts(tiny_llm, tiny_clip, template="plain").save_trained(tmp_path / "captions")
    (captions,) = find_runs(tmp_path / "captions")
    conversation = Conversation(captions)
    with pytest.raises(ValueError, match=r"template 'plain'.*add one, or train"):
        answered(conversation, slot, Question("what?"))
    assert answered(conversation, slot, Question("", (red,)))[-1].forgotten is None
