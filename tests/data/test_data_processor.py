from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmfast.data import Encoded, Processor, Template, get_template, load_samples

PIXELS = Image.new("RGB", (8, 8), "red")
IMAGE = {"type": "image", "image": PIXELS}
IGNORE = -100


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def sample(*messages: Any, id: str = "one") -> Any:
    """Strings are answers, the rest are turns."""
    turns = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in messages]
    return {"id": id, "messages": turns}


def learned(encoded: Encoded) -> list[int]:
    assert len(encoded.labels) == len(encoded.input_ids)
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (IGNORE, token) for token, label in pairs)
    return [label for label in encoded.labels if label != IGNORE]


def tokens(processor: Processor, ids: list[int]) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


def decode(processor: Processor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# What is supervised


def test_encode_supervises_answers_and_their_end(make_processor: Callable[..., Processor], kind: str) -> None:
    processor = make_processor(kind)
    encoded = processor.encode(sample(user(IMAGE, "What?"), "3", user("And?"), "A cat."))
    eos = processor.tokenizer.eos_token
    assert decode(processor, learned(encoded)).strip() == f"3{eos} A cat.{eos}"
    # The space before an answer is learned too, as a token of its own or with the digit.
    start = next(index for index, label in enumerate(encoded.labels) if label != IGNORE)
    answer = ["Ġ3"] if kind.startswith("byte-level") else ["▁", "3"]
    assert tokens(processor, encoded.input_ids)[start - 1].endswith(":")
    assert tokens(processor, encoded.input_ids)[start : start + len(answer) + 1] == [*answer, eos]


def test_encode_around_an_image_is_as_in_llava(make_processor: Callable[..., Processor]) -> None:
    """Text before and after an image are texts of their own: each begins with the tokenizer's prefix."""
    processor = make_processor("sentencepiece")
    shown = tokens(processor, processor.encode(sample(user(IMAGE, "What?"), "A cat.")).input_ids)
    place = shown.index("<image>")
    assert shown[0] == "<s>"
    assert shown[1].startswith("▁")
    assert shown[place - 2 : place + 7] == [":", "▁", "<image>", "<image>", "<image>", "<image>", "▁", "<0x0A>", "What"]


def test_encode_plain_supervises_the_caption_and_newline(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor("sentencepiece", "plain")
    encoded = processor.encode(sample(user(IMAGE, "Describe it."), "a cat"))
    ids, image_id = encoded.input_ids, processor.image_token_id
    assert ids[:5] == [processor.tokenizer.bos_token_id, *[image_id] * 4]
    assert encoded.labels == [IGNORE] * 5 + ids[5:]
    assert tokens(processor, ids)[-1] == "<0x0A>"
    assert decode(processor, ids[5:]) == "a cat\n"
    assert processor.tokenizer.eos_token_id not in ids


def test_encode_puts_one_bos_if_the_tokenizer_does(make_processor: Callable[..., Processor]) -> None:
    llama = make_processor("sentencepiece", "llama_2")
    ids = llama.encode(sample(user("Hi"), "Yes.", user("And?"), "No.")).input_ids
    bos, eos = llama.tokenizer.bos_token_id, llama.tokenizer.eos_token_id
    assert ids[0] == bos
    assert [ids[i + 1] for i, token in enumerate(ids[:-1]) if token == eos] == [bos]  # <s> between turns
    assert ids.count(bos) == 2
    without = make_processor("byte-level", "llama_2").encode(sample(user("Hi"), "Yes.", user("And?"), "No."))
    assert None not in without.input_ids
    assert without.input_ids[0] != make_processor("byte-level").tokenizer.eos_token_id


# Properties over conversations, tokenizers and templates

TEXT = st.text(st.sampled_from("a3 .\nÉ日:<\ue000"), max_size=12)
LITERALS = st.sampled_from(["</s>", "<s>", "<image>", "<|end|>", "<unk>", "a</s>b", "<<s>>", "</s</s>"])
PIECE = TEXT | LITERALS
ANSWER = st.lists(PIECE, min_size=1, max_size=3).map("".join).filter(str.strip)
QUESTION = st.lists(PIECE | st.just(IMAGE), min_size=1, max_size=4)
TURNS = st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=3)


@pytest.mark.parametrize("template", ["short", "vicuna_v1", "llama_2", "minigpt4", "plain"])
@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_encode_prompt_is_the_prefix_and_labels_are_the_rest(
    make_processor: Callable[..., Processor], kind: str, template: str, turns: list[Any]
) -> None:
    processor = make_processor(kind, template, max_length=10_000)
    turns = turns[:1] if template == "plain" else turns
    messages = [turn for question, answer in turns for turn in (user(*question), answer)]
    ids, labels = [], []
    for end in range(0, len(messages), 2):
        if template == "plain" and kind == "byte-level" and IMAGE not in turns[0][0]:
            break  # such a prompt has no token at all
        prompt = processor.encode(sample(*messages[: end + 1]), add_generation_prompt=True, load_media=False)
        full = processor.encode(sample(*messages[: end + 2]), load_media=False)
        count = len(prompt.input_ids)
        assert learned(prompt) == [] or prompt.labels == labels + [IGNORE] * (count - len(labels))
        assert prompt.input_ids[: len(ids)] == ids
        assert full.input_ids[:count] == prompt.input_ids
        assert full.labels == prompt.labels + full.input_ids[count:]
        assert len(full.input_ids) > count
        ids, labels = full.input_ids, full.labels


@pytest.mark.parametrize("template", ["minigpt4", "minigpt_v2"])
def test_encode_tokenises_minigpt4s_prompt_and_answer_apart(
    make_processor: Callable[..., Processor], kind: str, template: str
) -> None:
    processor = make_processor(kind, template)
    encoded = processor.encode(sample(user(IMAGE, "What is this?"), "A cat."), load_media=False)
    before, after, end = {
        "minigpt4": ("###Human: <Img>", "</Img> What is this? ###Assistant: ", "###"),
        "minigpt_v2": ("[INST] <Img>", "</Img> What is this? [/INST]", ""),
    }[template]
    tokens = processor.tokenizer
    first, second, answer = (
        tokens(text, add_special_tokens=False)["input_ids"] for text in (before, after, "A cat." + end)
    )
    answer += [] if end else [tokens.eos_token_id]
    begin = [tokens.bos_token_id] if tokens.bos_token_id is not None else []
    prompt = [*begin, *first, *[processor.image_token_id] * 4, *second]
    assert encoded.input_ids == prompt + answer
    assert encoded.labels == [IGNORE] * len(prompt) + answer


@pytest.mark.parametrize("template", ["short", "llama_2", "plain"])
@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_encode_text_never_becomes_a_control_token(
    make_processor: Callable[..., Processor], kind: str, template: str, turns: list[Any]
) -> None:
    processor = make_processor(kind, template, max_length=10_000)
    turns = turns[:1] if template == "plain" else turns
    messages = [turn for question, answer in turns for turn in (user(*question), answer)]
    encoded = processor.encode(sample(*messages), load_media=False)
    tokenizer, ids = processor.tokenizer, encoded.input_ids
    images = sum(part is IMAGE for question, _ in turns for part in question)
    assert ids.count(processor.image_token_id) == images * processor.tokens_per_image
    assert ids.count(tokenizer.eos_token_id) == (0 if template == "plain" else len(turns))
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == (len(turns) if template == "llama_2" else 1)
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    # Nothing of the answers is lost (but white space: a prefix "▁" decodes to a space, or to none).
    end = "" if template == "plain" else tokenizer.eos_token
    expected = "".join(answer + end for _, answer in turns)
    assert "".join(decode(processor, learned(encoded)).split()) == "".join(expected.split())


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, max_length=st.integers(1, 60))
def test_encode_cuts_text_at_the_end_only(
    make_processor: Callable[..., Processor], kind: str, turns: list[Any], max_length: int
) -> None:
    messages = sample(*[turn for question, answer in turns for turn in (user(*question), answer)])
    whole = make_processor(kind, max_length=10_000).encode(messages)
    image_id = make_processor(kind).image_token_id
    reversed_ids = whole.input_ids[::-1]
    end_of_images = len(whole.input_ids) - reversed_ids.index(image_id) if image_id in reversed_ids else 0
    processor = make_processor(kind, max_length=max_length)
    if end_of_images > max_length:
        with pytest.raises(ValueError, match=f"sample 'one': its images end at token {end_of_images} but max_length"):
            processor.encode(messages)
        return
    cut = processor.encode(messages)
    assert cut.input_ids == whole.input_ids[:max_length]
    assert cut.labels == whole.labels[:max_length]
    assert len(cut.media) * processor.tokens_per_image == cut.input_ids.count(image_id)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=4), left=st.booleans())
def test_collate_pads_and_keeps_everything(
    make_processor: Callable[..., Processor], lengths: list[tuple[int, int]], left: bool
) -> None:
    processor = make_processor()
    encoded = []
    for row, (words, images) in enumerate(lengths):
        ids = [processor.image_token_id] * 4 * images + list(range(5, 6 + words))
        labels = [IGNORE] * (len(ids) - 1) + ids[-1:]
        pixels = [torch.full((3, 8, 8), 10.0 * row + index) for index in range(images)]
        encoded.append(Encoded(str(row), ids, labels, pixels, [4] * images))
    batch = processor.collate(encoded, "left" if left else "right")
    width = max(len(item.input_ids) for item in encoded)
    for row, item in enumerate(encoded):
        pad = width - len(item.input_ids)
        before, after = (pad, 0) if left else (0, pad)
        for name, values, fill in (
            ("input_ids", item.input_ids, processor.pad_token_id),
            ("attention_mask", [1] * len(item.input_ids), 0),
            ("labels", item.labels, IGNORE),
        ):
            assert batch[name].dtype == torch.int64
            assert batch[name][row].tolist() == [fill] * before + values + [fill] * after
    expected = [image for item in encoded for image in item.media]
    assert ("pixel_values" in batch) == bool(expected)
    if expected:
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].equal(torch.stack(expected))


# Cases


def test_encode_reads_a_literal_special_token_as_text(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor("sentencepiece")
    encoded = processor.encode(sample(user("Is <image> or </s> a tag?"), "</s>"))
    shown = tokens(processor, encoded.input_ids)
    assert shown.count("</s>") == 1
    assert "<image>" not in shown
    assert "\ue000" not in decode(processor, encoded.input_ids)
    assert decode(processor, encoded.input_ids[1:-1]) == "USER: Is <image> or </s> a tag? ASSISTANT: </s>"


def test_encode_keeps_private_use_characters_of_the_text(make_processor: Callable[..., Processor], kind: str) -> None:
    processor = make_processor(kind)
    encoded = processor.encode(sample(user("a\ue000b </s>"), "\ue000"))
    assert decode(processor, encoded.input_ids).count("\ue000") == 2


def one_letter_special(special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["</s>", special], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token=special)


def test_encode_refuses_a_special_token_that_cannot_be_written_as_text(image_processor: Any) -> None:
    processor = Processor(one_letter_special("#"), image_processor, get_template("short"))
    assert processor.encode(sample(user("a"), "b"))
    with pytest.raises(ValueError, match=r"sample 'one': '#' in its text cannot be told from a special token"):
        processor.encode(sample(user("a # b"), "c"))


def test_encode_refuses_a_special_token_inside_a_longer_token(image_processor: Any) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "USER:": 2, "ASSISTANT:": 3, "yes": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    processor = Processor(tokenizer, image_processor, get_template("short"))
    assert processor.encode(sample(user("word"), "yes")).input_ids == [2, 0, 3, 4, 1]
    with pytest.raises(ValueError, match="sample 'one': 'a</s>b' in its text cannot be told from a special token"):
        processor.encode(sample(user("a</s>b"), "yes"))


def test_encode_refuses_a_token_over_the_begin_of_an_answer(image_processor: Any) -> None:
    """A tokenizer that joins words: "ASSISTANT:" and the space would be one token in training, two in generation."""
    joined = Tokenizer(models.BPE())
    joined.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False)
    joined.train_from_iterator(["USER: Who? ASSISTANT: Ann."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined, eos_token="</s>")
    with pytest.raises(ValueError, match=r"sample 'one': the token '.*: A.*' joins the end of a prompt to the begin"):
        Processor(tokenizer, image_processor, get_template("short")).encode(sample(user("Who?"), "Ann."))


def test_encode_does_not_cut_a_prompt(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor(max_length=5)
    with pytest.raises(ValueError, match=r"sample 'one': the prompt has .* tokens but max_length is 5; a prompt"):
        processor.encode(sample(user("What is in the picture?")), add_generation_prompt=True)


def test_encode_keeps_images_to_the_last_token(make_processor: Callable[..., Processor]) -> None:
    shown = sample(user("Who is ", IMAGE, "?"), "Ann.")
    ids = make_processor().encode(shown).input_ids
    end = len(ids) - ids[::-1].index(make_processor().image_token_id)
    assert make_processor(max_length=end).encode(shown).input_ids == ids[:end]
    with pytest.raises(ValueError, match=f"its images end at token {end} but max_length is {end - 1}"):
        make_processor(max_length=end - 1).encode(shown)


def test_encode_without_images_opens_no_file(make_processor: Callable[..., Processor], media: Path) -> None:
    processor = make_processor()
    path = {"type": "image", "image": "missing.png"}
    encoded = processor.encode(sample(user(path), "A cat."), load_media=False)
    assert encoded.media == []
    assert encoded.input_ids.count(processor.image_token_id) == 4
    with pytest.raises(ValueError, match=r"sample 'one': image .*missing.png"):
        processor.encode(sample(user(path), "A cat."), media_folder=media)
    with pytest.raises(ValueError, match=r"sample 'one': cannot read image .*broken.png"):
        processor.encode(sample(user({"type": "image", "image": "broken.png"}), "A"), media_folder=media)


def test_encode_images_in_order_through_the_image_processor(
    make_processor: Callable[..., Processor], image_processor: Any, media: Path
) -> None:
    parts = [{"type": "image", "image": name} for name in ("red.png", "sub/blue.png")]
    encoded = make_processor().encode(sample(user(parts[0], "or", parts[1]), "A"), media_folder=media)
    for image, color in zip(encoded.media, ("red", "blue"), strict=True):
        expected = image_processor(images=[Image.new("RGB", (8, 8), color)], return_tensors="pt")["pixel_values"][0]
        assert image.shape == (3, 8, 8)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, expected)


def test_encode_pads_to_a_square_on_request(make_processor: Callable[..., Processor], media: Path) -> None:
    wide = sample(user({"type": "image", "image": "red.png"}), "A")  # 12x8
    (cropped,) = make_processor().encode(wide, media_folder=media).media
    (padded,) = make_processor(pad_to_square=True).encode(wide, media_folder=media).media
    assert cropped[:, 0].allclose(cropped[:, 4])
    assert not padded[:, 0].allclose(padded[:, 4])
    assert padded[:, 0].abs().max() < 0.1  # the mean colour is 0 after normalisation


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (sample(user("x"), user("y")), "sample 'one': messages"),
        (sample(user("x")), "sample 'one': template 'short': the last turn is of 'user'"),
        (sample(user("x"), ""), "sample 'one': messages.*the answer is empty"),
    ],
)
def test_encode_names_a_malformed_sample(make_processor: Callable[..., Processor], broken: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor().encode(broken)


def test_encode_goes_on_after_an_empty_answer_of_the_model(make_processor: Callable[..., Processor]) -> None:
    assert make_processor().encode(sample(user("x"), "", user("y")), add_generation_prompt=True)


def test_encode_refuses_a_sample_without_a_token(make_processor: Callable[..., Processor]) -> None:
    with pytest.raises(ValueError, match=r"sample 'one': not one token with template 'plain'"):
        make_processor("byte-level", "plain").encode(sample(user("x")), add_generation_prompt=True)


def test_supervised_tokens_leaves_out_the_first_position() -> None:
    assert Encoded("a", [5, 6, 7], [5, IGNORE, 7], [], []).supervised_tokens == 1


def test_collate_refuses(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor()
    encoded = processor.encode(sample(user(IMAGE), "A"), load_media=False)
    with pytest.raises(
        ValueError, match=r"sample 'one' has 4 image tokens and 0 media, but its media have \[4\] tokens"
    ):
        processor.collate([encoded])
    with pytest.raises(ValueError, match=r"0 samples"):
        processor.collate([])
    with pytest.raises(ValueError, match=r"padding_side is 'middle'"):
        processor.collate([encoded], "middle")  # type: ignore[arg-type]


def test_collate_mixes_text_and_image_samples(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor()
    text, one, two = sample(user("x"), "A"), sample(user(IMAGE), "A"), sample(user(IMAGE, "or", IMAGE), "A")
    assert "pixel_values" not in processor.collate([processor.encode(text)] * 2)
    batch = processor.collate([processor.encode(item) for item in (one, text, two)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["input_ids"].eq(processor.image_token_id).sum(1).tolist() == [4, 0, 8]


# Construction, saving


def test_processor_refuses_a_slow_tokenizer(image_processor: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"Slow is a slow tokenizer; .*use_fast=True"):
        Processor(Slow(), image_processor, get_template("short"))


def test_processor_needs_an_end_token_for_most_templates(image_processor: Any) -> None:
    tokenizer = one_letter_special("#")
    tokenizer.eos_token = None
    processor = Processor(tokenizer, image_processor, get_template("plain"))
    with pytest.raises(ValueError, match=r"end-of-text token is None .*'short' ends answers with it"):
        Processor(tokenizer, image_processor, get_template("short"))
    with pytest.raises(ValueError, match=r"end-of-text token is None"):
        processor.template = get_template("vicuna_v1")


@pytest.mark.parametrize("argument", ["tokens_per_image", "max_length"])
def test_processor_refuses_sizes_below_one(make_processor: Callable[..., Processor], argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is 0"):
        make_processor(**{argument: 0})


def test_processor_adds_the_image_token_once(make_tokenizer: Callable[[str], Any], image_processor: Any) -> None:
    tokenizer = make_tokenizer("sentencepiece")
    size = len(tokenizer)
    first = Processor(tokenizer, image_processor, get_template("short"))
    second = Processor(tokenizer, image_processor, get_template("short"))
    assert first.image_token_id == second.image_token_id == size
    assert len(tokenizer) == size + 1


def test_pad_token_is_pad_else_unknown_else_end(make_tokenizer: Callable[[str], Any], image_processor: Any) -> None:
    llama = Processor(make_tokenizer("sentencepiece"), image_processor, get_template("short"))
    assert llama.pad_token_id == llama.tokenizer.pad_token_id
    llama.tokenizer.pad_token = None
    assert llama.pad_token_id == llama.tokenizer.unk_token_id
    qwen = Processor(make_tokenizer("byte-level"), image_processor, get_template("short"))
    assert qwen.pad_token_id == qwen.tokenizer.eos_token_id


def test_assigning_a_template_changes_the_prompt(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor()
    copied = copy.copy(processor)
    copied.template = get_template("plain")
    question = sample(user(IMAGE, "x"), "a")
    assert copied.encode(question).input_ids != processor.encode(question).input_ids
    assert processor.template.name == "short"


@pytest.mark.parametrize(
    ("value", "moves"),
    [
        ("<image>\nWhat is this?", False),
        ("What is this?\n<image>", True),
        ("<image> What is this? ", False),
        ("Look at <image> and say what it is.", True),
        ("What?", False),
        ("<image>", False),
    ],
)
def test_media_first_is_the_rule_of_the_original(
    make_processor: Callable[..., Processor], media: Path, value: str, moves: bool
) -> None:
    """LLaVA's train.py: the marker is taken out, the rest stripped, and marker and line break put before it."""
    expected = value
    if "<image>" in value:
        expected = ("<image>\n" + value.replace("<image>", "").strip()).strip()

    def read(text: str, **settings: bool) -> list[int]:
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a cat"}]
        record = {"id": "0", "conversations": turns, **({"image": "red.png"} if "<image>" in text else {})}
        (media / "data.json").write_text(json.dumps([record]))
        (loaded,) = load_samples(media / "data.json")
        return make_processor(**settings).encode(loaded, media_folder=media).input_ids

    assert read(value, media_first=True) == read(expected)
    assert (read(value) != read(expected)) == moves


def test_save_and_open_again(make_processor: Callable[..., Processor], kind: str, tmp_path: Path) -> None:
    processor = make_processor(kind, tokens_per_image=3, max_length=99, pad_to_square=True, media_first=True)
    processor.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "mmfast_processor.json"} <= names
    opened = Processor.from_pretrained(tmp_path / "saved")
    wide = sample(
        user({"type": "image", "image": Image.new("RGB", (12, 6), "red")}, "What </s>?"), "3", user("É日"), "B"
    )
    before, after = processor.encode(wide), opened.encode(wide)
    assert (after.input_ids, after.labels) == (before.input_ids, before.labels)
    assert torch.equal(after.media[0], before.media[0])
    assert opened.settings() == processor.settings()
    for name in ("template", "image_token_id", "media_first"):
        assert getattr(opened, name) == getattr(processor, name)
    changed = Processor.from_pretrained(tmp_path / "saved", template="plain", max_length=5)
    assert (changed.template.name, changed.max_length, changed.tokens_per_image) == ("plain", 5, 3)
    own = Template("mine", user_prefix="Q: ", user_suffix=" A:")
    assert Processor.from_pretrained(tmp_path / "saved", template=own).template is own


def test_open_refuses(make_processor: Callable[..., Processor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        Processor.from_pretrained(tmp_path / "nowhere")
    make_processor().save_pretrained(tmp_path)
    file = tmp_path / "mmfast_processor.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "template": "mine"}))
    with pytest.raises(ValueError, match=r"no template 'mine'"):
        Processor.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no mmfast_processor.json; pass template and tokens_per_image"):
        Processor.from_pretrained(tmp_path)
    assert Processor.from_pretrained(tmp_path, template="short", tokens_per_image=2).tokens_per_image == 2


def test_processor_can_be_sent_to_data_workers(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor()
    question = sample(user("x </s>"), "a")
    assert pickle.loads(pickle.dumps(processor)).encode(question) == processor.encode(question)
