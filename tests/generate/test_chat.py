"""ChatSession and the terminal: streams, history, stopping, sampling, errors."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmfast.generate import ChatSession, answer_batch, chat
from mmfast.generate.terminal import HELP, _Terminal
from mmfast.models import Llava

RED = Image.new("RGB", (40, 30), (255, 0, 0))
BLUE = Image.new("RGB", (40, 30), (0, 0, 255))


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "a red image.png"
    RED.save(path)
    return path


@pytest.fixture
def run(model: Llava, tmp_path: Path) -> str:
    folder = tmp_path / "run" / "model"
    model.save_trained(folder)
    return str(folder.parent)


def test_pieces_join_to_the_answer(model: Llava) -> None:
    pieces = list(ChatSession(model, max_new_tokens=20).stream("what is it?", [RED]))
    assert len(pieces) > 5
    assert "".join(pieces) == ChatSession(model, max_new_tokens=20).send("what is it?", [RED])


def test_answer_equals_that_of_the_batch(model: Llava) -> None:
    sample: Any = {
        "id": "a",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what is it?"}]}
        ],
    }
    answer = ChatSession(model, max_new_tokens=12).send("what is it?", [RED])
    assert answer == answer_batch(model, [sample], 1, 12)[0]
    assert answer != ChatSession(model, max_new_tokens=12).send("what is it?", [BLUE])


def test_later_turns_see_the_earlier_ones(model: Llava) -> None:
    session = ChatSession(model, max_new_tokens=8)
    first = session.send("what is it?", [RED])
    second = session.send("and the dog?")
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]
    assert session.messages[1]["content"] == first
    history: Any = {"id": "h", "messages": session.messages}
    assert answer_batch(model, [history], 1, 8) == [second]
    assert ChatSession(model, max_new_tokens=8).send("and the dog?") != second
    session.reset()
    assert session.messages == []
    assert session.send("what is it?", [RED]) == first


def test_images_may_be_files_anywhere(model: Llava, image_file: Path) -> None:
    expected = ChatSession(model, max_new_tokens=8).send("it?", [RED])
    assert ChatSession(model, max_new_tokens=8).send("it?", [image_file]) == expected
    link = image_file.parent / "links" / "it.png"
    link.parent.mkdir()
    link.symlink_to(image_file)
    assert ChatSession(model, max_new_tokens=8).send("it?", [str(link)]) == expected


def test_several_images_in_one_turn(model: Llava) -> None:
    one = ChatSession(model, max_new_tokens=8).send("it?", [RED, BLUE])
    assert one != ChatSession(model, max_new_tokens=8).send("it?", [BLUE, RED])


def test_a_missing_image_is_named_and_leaves_no_trace(model: Llava, tmp_path: Path) -> None:
    session = ChatSession(model)
    with pytest.raises(ValueError, match=r"nothing\.png"):
        session.send("it?", [tmp_path / "nothing.png"])
    assert session.messages == []


def test_sampling_depends_on_the_seed_and_touches_no_other_generator(model: Llava) -> None:
    def sampled(seed: int) -> str:
        return ChatSession(model, temperature=1.5, max_new_tokens=16, seed=seed).send("it?", [RED])

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sampled(0)
    assert torch.equal(torch.rand(3), expected)
    assert sampled(0) == first
    assert sampled(1) != first


def test_a_small_top_p_is_greedy(model: Llava) -> None:
    greedy = ChatSession(model, max_new_tokens=8).send("it?", [RED])
    assert ChatSession(model, temperature=1.0, top_p=1e-6, max_new_tokens=8).send("it?", [RED]) == greedy


def test_sampling_is_not_cut_to_fifty_tokens(model: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: (seen.update(options), generate(**options))[1])
    ChatSession(model, temperature=0.7, top_p=0.9, max_new_tokens=2).send("it?")
    assert (seen["temperature"], seen["top_p"], seen["top_k"]) == (0.7, 0.9, 0)


def test_a_closed_stream_stops_the_model_and_is_forgotten(model: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = model.language_model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(0.01)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", counted)
    threads = set(threading.enumerate())
    session = ChatSession(model, max_new_tokens=400)
    stream: Any = session.stream("it?")
    next(stream)
    stream.close()
    assert calls < 200
    assert set(threading.enumerate()) <= threads  # those of earlier tests may end meanwhile
    assert session.messages == []


def test_an_event_of_another_thread_ends_an_answer_without_a_trace(model: Llava) -> None:
    stop = threading.Event()
    session = ChatSession(model, max_new_tokens=400, stop=stop)
    whole = session.send("it?")
    session.reset()
    pieces = []
    for piece in session.stream("it?"):
        pieces.append(piece)
        stop.set()
    assert len("".join(pieces)) < len(whole) / 2
    assert session.messages == []
    stop.clear()
    assert session.send("it?") == whole


def test_an_error_inside_the_model_reaches_the_caller(model: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", broken)
    session = ChatSession(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.send("it?")
    assert session.messages == []


def test_an_answer_ends_with_the_context(model: Llava) -> None:
    session = ChatSession(model, max_new_tokens=100_000)
    prompt = len(model.processor.encode(asked("it?"), add_generation_prompt=True).input_ids)
    session.send("it?")
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the model's context of 512.*start the chat over"):
        session.send("and then?")
    assert len(session.messages) == 2
    tokens = model.processor.tokenizer.encode(session.messages[1]["content"], add_special_tokens=False)
    assert prompt + len(tokens) > 256


def asked(text: str) -> Any:
    return {"id": "q", "messages": [{"role": "user", "content": text}]}


def test_max_length_of_the_training_does_not_limit_a_chat(model: Llava) -> None:
    expected = ChatSession(model, max_new_tokens=8).send("it?")
    model.processor.max_length = 4
    assert ChatSession(model, max_new_tokens=8).send("it?") == expected
    assert model.processor.max_length == 4


def test_an_empty_answer_is_not_kept(model: Llava) -> None:
    model.language_model.generation_config.eos_token_id = list(range(len(model.processor.tokenizer)))
    session = ChatSession(model)
    assert session.send("it?") == ""
    assert session.messages == []


def test_characters_and_spaces_are_shown_when_they_are_whole(model: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = model.processor.tokenizer
    text = "  a  cat é "
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text) - 4

    def generate(streamer: Any, **options: Any) -> None:
        streamer.put(torch.zeros(1, 0, dtype=torch.long))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(model, "generate", generate)
    pieces = list(ChatSession(model).stream("it?"))
    assert "".join(pieces) == "a  cat é"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert not any(piece.endswith(" ") for piece in pieces)


def test_a_caption_model_needs_an_image_and_keeps_turns_apart(captioner: Llava) -> None:
    session = ChatSession(captioner, max_new_tokens=8)
    first = session.send("anything", [RED])
    assert session.send("something else", [RED]) == first
    with pytest.raises(ValueError, match="template 'plain'"):
        session.send("what is it?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_options_out_of_range_are_refused(model: Llava, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatSession(model, **options)


def test_chat_answers_prompts_and_leaves(run: str, model: Llava, image_file: Path, capsys: Any) -> None:
    chat(run, image=str(image_file), prompt=["it?", "and the dog?"], max_new_tokens=8)
    session = ChatSession(model, max_new_tokens=8)
    expected = [session.send("it?", [RED]), session.send("and the dog?")]
    assert capsys.readouterr().out.splitlines() == expected


def test_chat_reads_a_pipe(
    run: str, model: Llava, image_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = f"hello\n\n/reset\n/image '{image_file}'\nit?\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat(run, max_new_tokens=8)
    session = ChatSession(model, max_new_tokens=8)
    expected = [session.send("hello")]
    session.reset()
    expected.append(session.send("it?", [RED]))
    assert capsys.readouterr().out.splitlines() == expected


def test_chat_with_an_unknown_command_or_image_fails_in_a_pipe(
    run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/images a.png\n"))
    with pytest.raises(ValueError, match="/images"):
        chat(run)
    with pytest.raises(ValueError, match=r"nothing\.png"):
        chat("no run is opened before", image=[str(tmp_path / "nothing.png")])


def test_a_person_sees_errors_and_goes_on(model: Llava, tmp_path: Path, capsys: Any) -> None:
    session = ChatSession(model, max_new_tokens=4)
    terminal = _Terminal(session, [], [], interactive=True)
    terminal.run([f"/image {tmp_path}/nothing.png", f"/video {tmp_path}/nothing.mp4", "/what", "hello", "/quit"])
    out, err = capsys.readouterr()
    assert "nothing.png" in err
    assert "nothing.mp4" in err
    assert out.splitlines() == [HELP, session.messages[1]["content"]]


def test_ctrl_c_stops_the_answer_and_keeps_the_images(
    model: Llava, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    session = ChatSession(model, max_new_tokens=4)

    def interrupted(text: str, images: Any, videos: Any) -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "stream", interrupted)
    terminal = _Terminal(session, [RED], ["clip.mp4"], interactive=True)
    terminal.run(["it?"])
    assert "stopped" in capsys.readouterr().out
    assert (terminal.images, terminal.videos) == ([RED], ["clip.mp4"])


@pytest.mark.parametrize("ending", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_leaves_politely(
    run: str, ending: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    prompts = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) > 1:
            raise ending
        return "hello"

    monkeypatch.setattr("sys.stdin", Keyboard())
    monkeypatch.setattr("builtins.input", typed)
    chat(run, max_new_tokens=4)
    assert prompts == ["> ", "> "]
    assert capsys.readouterr().out.startswith(HELP)
