from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.data import load_samples, validate_sample, without_last_answer

QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "A cat."}


def sample(**changes: Any) -> dict[str, Any]:
    return {"id": "one", "messages": [QUESTION, ANSWER], **changes}


def write(folder: Path, text: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def llava(value: str, image: Any = None, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "A cat."}]
    return {"id": "one", "conversations": turns, **({} if image is None else {"image": image}), **changes}


def first_turn(path: Path) -> list[tuple[str, str]]:
    (loaded,) = load_samples(path)
    return [(part["type"], part[part["type"]]) for part in loaded["messages"][0]["content"]]


def test_validate_accepts_every_form() -> None:
    image = {"type": "image", "image": Image.new("RGB", (2, 2))}
    path = {"type": "image", "image": "a.png"}
    user = {"role": "user", "content": [image, {"type": "text", "text": "and"}, path]}
    validate_sample(sample(messages=[{"role": "system", "content": "Be kind."}, user, ANSWER, QUESTION, ANSWER]))
    validate_sample(sample(messages=[QUESTION], answer="7", kind="position"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1], r"file: a sample is \[1\]"),
        (sample(id=3), "file: id is 3; expected a non-empty string"),
        ({"messages": [QUESTION]}, "file: id is None"),
        (sample(messages=[]), r"file 'one': messages is \[\]"),
        (sample(messages=["hi"]), r"file 'one': messages\[0\].role is 'hi'; accepted are"),
        (sample(messages=[{"role": "gpt", "content": "x"}]), r"'one': messages\[0\].role is 'gpt'"),
        (sample(messages=[{"role": "user"}]), r"'one': messages\[0\].content is None"),
        (sample(messages=[{"role": "user", "content": ["x"]}]), r"messages\[0\].content\[0\] is 'x'; accepted types"),
        (
            sample(messages=[{"role": "user", "content": [{"type": "audio"}]}]),
            "accepted types are 'text', 'image' and 'video'",
        ),
        (
            sample(messages=[{"role": "user", "content": [{"type": "video", "video": []}]}]),
            r"content\[0\].video is \[\]; expected a path or a sequence of PIL images",
        ),
        (
            sample(messages=[QUESTION, {"role": "assistant", "content": [{"type": "video", "video": "a.mp4"}]}]),
            "a video in a turn of 'assistant'",
        ),
        (sample(messages=[{"role": "user", "content": [{"type": "text"}]}]), r"content\[0\].text is None"),
        (sample(messages=[{"role": "user", "content": [{"type": "image", "image": 3}]}]), r"content\[0\].image is 3"),
        (sample(messages=[{"role": "user", "content": [{"type": "image", "image": ""}]}]), "image is ''"),
        (
            sample(messages=[QUESTION, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]),
            "an image in a turn of 'assistant'; move it",
        ),
        (
            sample(messages=[QUESTION, {"role": "assistant", "content": " "}]),
            r"messages\[1\].content: the answer is em",
        ),
        (sample(messages=[ANSWER]), r"messages\[0\] is a turn of 'assistant' where one of 'user'"),
        (sample(messages=[QUESTION, QUESTION]), r"messages\[1\] is a turn of 'user' where one of 'assistant'"),
        (sample(messages=[QUESTION, ANSWER, ANSWER]), r"messages\[2\] is a turn of 'assistant'"),
        (sample(messages=[QUESTION, {"role": "system", "content": "x"}]), r"messages\[1\] is a turn of 'system'"),
        (sample(messages=[{"role": "system", "content": "x"}]), "only a system turn"),
    ],
)
def test_validate_names_sample_and_field(broken: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_sample(broken, "file")


def test_validate_allows_an_empty_answer_on_request() -> None:
    validate_sample(sample(messages=[QUESTION, {"role": "assistant", "content": ""}]), allow_empty_answers=True)


def test_without_last_answer_keeps_the_rest_and_the_original() -> None:
    full = sample(answer="cat")
    asked = without_last_answer(full)  # type: ignore[arg-type]
    assert asked == {"id": "one", "messages": [QUESTION], "answer": "cat"}
    assert full["messages"] == [QUESTION, ANSWER]
    assert without_last_answer(asked) == asked


def test_load_messages_as_json_and_as_json_lines(tmp_path: Path) -> None:
    records = [sample(id="a", kind="k"), sample(id=2), {"messages": [QUESTION]}]
    listed = load_samples(write(tmp_path, json.dumps(records, indent=1)))
    lines = load_samples(write(tmp_path, "\n".join(map(json.dumps, records)) + "\n\n", "data.jsonl"))
    assert [item["id"] for item in listed] == ["a", "2", "data-2"]
    assert listed == lines
    assert listed[0]["kind"] == "k"


def test_load_json_lines_keeps_unicode_line_separators(tmp_path: Path) -> None:
    record = sample(messages=[{"role": "user", "content": "a\u2028b\x85c"}])
    (loaded,) = load_samples(write(tmp_path, json.dumps(record, ensure_ascii=False), "data.jsonl"))
    assert loaded["messages"][0]["content"] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("value", "image", "expected"),
    [
        ("<image>\nWhat?", "a.png", [("image", "a.png"), ("text", "\nWhat?")]),
        ("What?\n<image>", "a.png", [("text", "What?\n"), ("image", "a.png")]),
        ("What?", "a.png", [("image", "a.png"), ("text", "What?")]),
        ("<image> or <image>?", ["a.png", "b.png"],
         [("image", "a.png"), ("text", " or "), ("image", "b.png"), ("text", "?")]),
        ("Which?", ["a.png", "b.png"], [("image", "a.png"), ("image", "b.png"), ("text", "Which?")]),
        ("What?", None, [("text", "What?")]),
    ],
)  # fmt: skip
def test_load_llava_keeps_the_position_of_markers(tmp_path: Path, value: str, image: Any, expected: list[Any]) -> None:
    assert first_turn(write(tmp_path, [llava(value, image)])) == expected


def test_load_llava_spreads_images_over_turns_and_leaves_answers_alone(tmp_path: Path) -> None:
    record = llava("<image>\nA?", ["1.png", "2.png"])
    record["conversations"] += [{"from": "human", "value": "B <image>?"}, {"from": "gpt", "value": "an <image> tag"}]
    (loaded,) = load_samples(write(tmp_path, [record]))
    assert loaded["messages"][2]["content"][1] == {"type": "image", "image": "2.png"}
    assert loaded["messages"][3]["content"] == "an <image> tag"
    assert "conversations" not in loaded
    assert "image" not in loaded


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (llava("<image> <image>", "a.png"), "sample 'one': 2 '<image>' in the human turns but 1 images"),
        (llava("<image>", ["a.png", "b.png"]), "'one': 1 '<image>' in the human turns but 2 images"),
        (llava("<image>"), "'one': 1 '<image>' in the human turns but 0 images"),
        (llava("x", 3), "'one': image is 3; expected a path or a list of paths"),
        (llava("x", conversations=[]), r"'one': conversations is \[\]"),
        (llava("x", conversations=[{"from": "bing", "value": "x"}]), r"'one': conversations\[0\] is .*'bing'"),
        (llava("x", conversations=[{"from": "gpt", "value": "x"}]), r"'one': messages\[0\] is a turn of 'assistant'"),
        (llava("x", "../secret.png"), "'one': image path '../secret.png' leaves the media folder"),
        (llava("x", "a/../../b.png"), "leaves the media folder"),
        (llava("x", "/etc/passwd"), "'one': image path '/etc/passwd' leaves the media folder"),
    ],
)
def test_load_llava_refuses_by_name(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(write(tmp_path, [record]))


def test_load_accepts_an_absolute_path_below_the_media_folder(tmp_path: Path) -> None:
    path = write(tmp_path, [llava("x", str(tmp_path / "images" / "a.png"))])
    assert len(load_samples(path)) == 1
    assert len(load_samples(path, tmp_path / "images")) == 1
    with pytest.raises(ValueError, match=r"leaves the media folder"):
        load_samples(path, tmp_path / "other")


def test_load_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample 'one': an earlier sample has the same id"):
        load_samples(write(tmp_path, [sample(), sample()]))
    # Published LLaVA files use the image's name as id of several records.
    loaded = load_samples(write(tmp_path, [llava("x"), llava("y"), llava("z")]))
    assert [item["id"] for item in loaded] == ["one", "one#2", "one#3"]
    mixed = [{"messages": [QUESTION]}, sample(id="data-0"), {"messages": [QUESTION]}]
    assert [item["id"] for item in load_samples(write(tmp_path, mixed))] == ["data-0#2", "data-0", "data-2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"messages": [{"role": "user", "content": "x"}]},\n {"id": }]',
            r"data.json:2: broken JSON: Expecting value \(column 9\)",
        ),
        ('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n\n{"id"', "data.json:3: broken JSON"),
        ('[{"messages": [{"role": "user", "content": "x"}]}', "data.json: broken JSON: '' where its list ends"),
        ('[{"messages": [{"role": "user", "content": "x"}]},]', "data.json:1: broken JSON: Expecting value"),
        ('[{"messages": [{"role": "user", "content": "x"}]} 3]', "broken JSON: '3]' where its list ends"),
        ("[]", "no samples"),
        ("", "no samples"),
        ("[1]", "a record is 1; expected an object"),
        ('{"id": "a"}', "data.json:1: sample 'a': messages is None"),
    ],
)
def test_load_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(write(tmp_path, text))


def test_load_names_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(ValueError, match=r"data.json: not UTF-8"):
        load_samples(tmp_path / "data.json")


def test_load_llava_with_videos(tmp_path: Path) -> None:
    for value, expected in [
        ("What?\n<video>", [("text", "What?\n"), ("video", "a.mp4")]),
        ("<video>\nWhat?", [("video", "a.mp4"), ("text", "\nWhat?")]),
        ("What?", [("video", "a.mp4"), ("text", "What?")]),
    ]:
        assert first_turn(write(tmp_path, [llava(value, video="a.mp4")])) == expected
    both = llava("<video> and <image>", "b.png", video="a.mp4")
    assert first_turn(write(tmp_path, [both])) == [("video", "a.mp4"), ("text", " and "), ("image", "b.png")]
    # Text where there is no video: an element of HTML.
    assert first_turn(write(tmp_path, [llava("a <video> tag")])) == [("text", "a <video> tag")]
    with pytest.raises(ValueError, match=r"'one': 2 '<video>' in the human turns but 1 videos"):
        load_samples(write(tmp_path, [llava("<video><video>", video="a.mp4")]))
    with pytest.raises(ValueError, match=r"'one': video path '../a.mp4' leaves the media folder"):
        load_samples(write(tmp_path, [llava("x", video="../a.mp4")]))


def test_load_video_instruct_as_video_chatgpt_converts_it(tmp_path: Path) -> None:
    (tmp_path / "v_1.mp4").touch()
    (tmp_path / "v_2.mp4").touch()
    (tmp_path / "v_2.pkl").touch()
    records = [
        {"q": f"Q{index}", "a": "A.", "video_id": name} for index, name in enumerate(["v_1", "v_2", "v_1", "v_3"])
    ]
    loaded = load_samples(write(tmp_path, records))
    assert [sample["id"] for sample in loaded] == ["v_1", "v_2", "v_1#2", "v_3"]
    turns = [[(part["type"], part[part["type"]]) for part in sample["messages"][0]["content"]] for sample in loaded]
    assert turns == [
        [("text", "Q0\n"), ("video", "v_1.mp4")],
        [("video", "v_2.pkl"), ("text", "\nQ1")],
        [("text", "Q2\n"), ("video", "v_1.mp4")],
        [("video", "v_3.pkl"), ("text", "\nQ3")],
    ]
    assert all(sample["messages"][1]["content"] == "A." for sample in loaded)
    with pytest.raises(ValueError, match="expected texts as 'q', 'a' and 'video_id'"):
        load_samples(write(tmp_path, [{"q": "Q", "a": 3, "video_id": "v_1"}]))


def test_load_alpaca(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "kind": "sum"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "What is it?", "image": "a.png", "output": "a cat"},
    ]
    first, second, third = load_samples(write(tmp_path, json.dumps(records), "alpaca_data.json"))
    assert first == {
        "id": "alpaca_data-0",
        "kind": "sum",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Add."}, {"type": "text", "text": "1 2", "is_input": True}],
            },
            {"role": "assistant", "content": "3"},
        ],
    }
    assert second["messages"][0]["content"] == [{"type": "text", "text": "Say hi."}]
    assert third["messages"][0]["content"][0] == {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "Add."}, "sample 'data-0': output is None; expected a text"),
        ({"instruction": "", "output": "3"}, "sample 'data-0': instruction is ''"),
        ({"instruction": "Add.", "input": 3, "output": "3"}, "sample 'data-0': input is 3"),
        ({"instruction": "Add.", "image": "../a.png", "output": "3"}, "leaves the media folder"),
    ],
)
def test_load_alpaca_refuses_by_name(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(write(tmp_path, json.dumps([record])))


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_an_input_stands_in_a_question(role: str) -> None:
    content = [{"type": "text", "text": "x", "is_input": True if role == "assistant" else "yes"}]
    turns = [{"role": "user", "content": content}] if role == "user" else [QUESTION, {"role": role, "content": content}]
    with pytest.raises(ValueError, match=f"is_input is .* in a turn of '{role}'"):
        validate_sample(sample(messages=turns))
