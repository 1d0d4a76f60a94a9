"""Video-ChatGPT: what a video becomes, what trains, what is saved, and what is said of wrong input."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmfast.data import get_template
from mmfast.generate import ChatSession, answer_batch
from mmfast.models import VideoChatGpt, open_model
from mmfast.models.video_chatgpt import VideoChatGptConfig

FRAMES = 5
PATCHES = 4
ROWS = FRAMES + PATCHES + 2


@pytest.fixture
def model(llm: Path, encoder: Path) -> VideoChatGpt:
    torch.manual_seed(0)
    model = VideoChatGpt.from_parts(llm, encoder, num_frames=FRAMES)
    nn.init.normal_(model.markers.weight)
    return model.eval()


def clip(frames: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def ask(video: Any, question: str = "what?", answer: str | None = "a cat", name: str = "one") -> dict[str, Any]:
    content = [{"type": "text", "text": f"{question}\n"}, {"type": "video", "video": video}]
    messages: list[Any] = [{"role": "user", "content": content}]
    return {"id": name, "messages": messages + ([] if answer is None else [{"role": "assistant", "content": answer}])}


def inputs_of(model: VideoChatGpt, *samples: Any) -> dict[str, Tensor]:
    return model.processor.collate([model.processor.encode(sample) for sample in samples])


def media_of(model: VideoChatGpt, *samples: Any) -> dict[str, Tensor]:
    batch = inputs_of(model, *samples)
    return {name: batch[name] for name in model.media_inputs if name in batch}


class FixedFeatures(nn.Module):
    """An encoder whose features of frame i are those it was given."""

    hidden_size, num_patches = 32, PATCHES

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.features[pixel_values[:, 0, 0, 0].long()]


def rows_of_features(model: VideoChatGpt, features: Tensor) -> Tensor:
    model.encoder = FixedFeatures(features)
    frames = torch.arange(len(features)).view(-1, 1, 1, 1).expand(-1, 3, 1, 1).float()
    with torch.no_grad():
        return model.media_features(frames, torch.tensor([len(features)]))


@pytest.mark.parametrize("frames", [1, 3, FRAMES])
def test_rows_are_start_frame_means_zeros_patch_means_end(model: VideoChatGpt, frames: int) -> None:
    features = torch.randn(frames, PATCHES, 32)
    rows = rows_of_features(model, features)
    weight, bias = (tensor.double() for tensor in (model.connector.weight, model.connector.bias))
    pooled = torch.zeros(FRAMES + PATCHES, 32, dtype=torch.float64)
    pooled[:frames] = features.double().mean(1)
    pooled[FRAMES:] = features.double().mean(0)
    expected = torch.cat([model.markers.weight[:1], pooled @ weight.T + bias, model.markers.weight[1:]])
    assert rows.shape == (ROWS, 48)
    assert torch.allclose(rows.double(), expected, atol=1e-5)
    # Rows that a short clip lacks are zeros before the projection, so its bias after it.
    assert torch.equal(rows[1 + frames : 1 + FRAMES], model.connector.bias.expand(FRAMES - frames, -1))


def test_means_of_both_parts_agree_where_no_frame_lacks(model: VideoChatGpt) -> None:
    rows = rows_of_features(model, torch.randn(FRAMES, PATCHES, 32))
    assert torch.allclose(rows[1 : 1 + FRAMES].mean(0), rows[1 + FRAMES : -1].mean(0), atol=1e-5)


def test_order_of_frames_and_patches(model: VideoChatGpt) -> None:
    features = torch.randn(FRAMES, PATCHES, 32)
    frames, patches = torch.randperm(FRAMES), torch.randperm(PATCHES)
    rows = rows_of_features(model, features)
    turned = rows_of_features(model, features[frames])
    assert torch.allclose(turned[1 : 1 + FRAMES], rows[1 : 1 + FRAMES][frames], atol=1e-5)
    assert torch.allclose(turned[1 + FRAMES : -1], rows[1 + FRAMES : -1], atol=1e-5)
    turned = rows_of_features(model, features[:, patches])
    assert torch.allclose(turned[1 : 1 + FRAMES], rows[1 : 1 + FRAMES], atol=1e-5)
    assert torch.allclose(turned[1 + FRAMES : -1], rows[1 + FRAMES : -1][patches], atol=1e-5)


def test_a_video_stands_between_its_start_and_its_end(model: VideoChatGpt) -> None:
    batch = inputs_of(model, ask(clip(9)))
    (ids,) = batch["input_ids"].tolist()
    places = [index for index, token in enumerate(ids) if token == model.config.image_token_id]
    assert len(places) == ROWS == model.features_per_medium
    assert places == list(range(places[0], places[0] + ROWS))
    media = {name: batch[name] for name in model.media_inputs if name in batch}
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], **media)[0]
        features = model.media_features(**media)
    assert torch.equal(embeds[places], features)
    assert torch.equal(embeds[[places[0], places[-1]]], model.markers.weight)
    words = [index for index in range(len(ids)) if index not in places]
    assert torch.equal(embeds[words], model.get_input_embeddings().weight[[ids[index] for index in words]])


def test_published_sizes() -> None:
    config = VideoChatGptConfig()
    assert (config.num_frames, config.vision_feature_layer, config.image_token_id) == (100, -2, 32003)
    model = VideoChatGpt.skeleton("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14")
    assert model.features_per_medium == 358  # 100 + 256 between start and end
    assert model.connector.weight.shape == (4096, 1024)
    assert model.markers.weight.shape == (2, 4096)


def test_markers_begin_as_the_mean_of_all_words(llm: Path, encoder: Path) -> None:
    model = VideoChatGpt.from_parts(llm, encoder, num_frames=FRAMES)
    mean = model.get_input_embeddings().weight.mean(0)
    assert torch.allclose(model.markers.weight, mean.expand(2, -1), atol=1e-6)


def test_only_connector_and_markers_train(model: VideoChatGpt) -> None:
    stage = model.stages()["instruct"]
    assert (stage.template, dict(stage.train)) == ("vicuna_v1", {"connector": 2e-5, "markers": 2e-5})
    model.set_stage(stage)
    model(**inputs_of(model, ask(clip(9)), ask(clip(2), name="two"))).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"connector.weight", "connector.bias", "markers.weight"}
    assert all(bool(model.get_parameter(name).grad.abs().sum(-1).all()) for name in trained)
    with pytest.raises(ValueError, match="trains language_model; accepted are connector, markers"):
        model.set_stage(type(stage)("mine", "vicuna_v1", {"language_model": 1e-5}))


def test_a_batch_of_text_alone_leaves_gradients_of_zero(model: VideoChatGpt) -> None:
    model.set_stage(model.stages()["instruct"])
    sample = {"id": "t", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    model(**inputs_of(model, sample)).loss.backward()
    assert all(not bool(model.get_parameter(name).grad.any()) for name in ("connector.weight", "markers.weight"))


def test_batch_is_single(model: VideoChatGpt) -> None:
    # A connector as loud as words, so that what is seen decides what is said.
    torch.nn.init.normal_(model.connector.weight, generator=torch.Generator().manual_seed(0))
    samples = [ask(clip(frames, frames), "what is it" * frames, None, str(frames)) for frames in (9, 1, 3)]
    samples.append({"id": "text", "messages": [{"role": "user", "content": "hello"}]})
    together = answer_batch(model, samples, batch_size=4, max_new_tokens=6)
    assert together == [answer_batch(model, [sample], batch_size=1, max_new_tokens=6)[0] for sample in samples]
    assert len(set(together)) > 1


def test_questions_are_asked_with_the_chat_template(model: VideoChatGpt) -> None:
    processor: Any = model.processor
    asked = processor.encode(ask(clip(1), answer=None), add_generation_prompt=True, load_media=False).input_ids
    trained = processor.encode(ask(clip(1)), load_media=False).input_ids
    text = processor.tokenizer.decode([token for token in asked if token != model.config.image_token_id])
    assert "You are Video-ChatGPT" in text
    assert "natural language.Follow the instructions" in text
    assert processor.template is get_template("vicuna_v1")
    assert "artificial intelligence" in processor.tokenizer.decode(trained)


@pytest.mark.parametrize(("protocol", "module"), [(3, b"numpy._core"), (3, b"numpy.core"), (4, b""), (5, b"")])
def test_published_features_stand_for_the_frames(
    model: VideoChatGpt, tmp_path: Path, protocol: int, module: bytes
) -> None:
    frames = clip(9)
    with torch.no_grad():
        pooled = model.frozen_features(**media_of(model, ask(frames)))[0]
        content = pickle.dumps(pooled.half().numpy(), protocol)
        (tmp_path / "v_1.pkl").write_bytes(content.replace(b"numpy._core", module) if module else content)
        processor: Any = model.processor
        encoded = [processor.encode(ask(video), media_folder=tmp_path) for video in (clip(2), "v_1.pkl", frames)]
        batch = processor.collate(encoded)
        assert batch["frame_counts"].tolist() == [2, FRAMES]
        assert batch["has_features"].tolist() == [False, True, False]
        assert batch["features"].dtype == torch.float32
        media = {name: batch[name] for name in (*model.media_inputs, "features", "has_features")}
        rows = model.media_features(**media).view(3, ROWS, -1)
    assert torch.allclose(rows[1], rows[2], rtol=2e-3, atol=2e-3)
    assert not torch.allclose(rows[0], rows[2], atol=0.1)


def test_feature_files_execute_nothing(model: VideoChatGpt, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    good = np.zeros((FRAMES + PATCHES, 32), np.float16)
    for content, message in [
        (Harm(), "which is no part of a numpy array"),
        ([good], "holds list; a float16 or float32 array"),
        (good.astype(np.int64), "holds int64"),
        (np.array([[Harm()]], dtype=object), "is no part of a numpy array"),
        (good[:-1], rf"features \[{FRAMES + PATCHES - 1}, 32\]; {FRAMES + PATCHES} rows are accepted"),
        (good + np.float16("nan"), "not finite"),
    ]:
        (tmp_path / "v.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=f"'one': .*{message}"):
            model.processor.encode(ask("v.pkl"), media_folder=tmp_path)
    (tmp_path / "v.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="is not the pickle of a numpy array"):
        model.processor.encode(ask("v.pkl"), media_folder=tmp_path)
    assert not (tmp_path / "harm").exists()


def test_frames_are_squashed_by_nearest_neighbour(model: VideoChatGpt) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 53, 3), dtype=np.uint8))
    pixels = model.processor.encode(ask([wide])).media[0]
    taken = np.array(wide).astype(np.float32)
    rows = np.floor(np.arange(16, dtype=np.float32) * np.float32(30 / 16)).astype(int)
    columns = np.floor(np.arange(16, dtype=np.float32) * np.float32(53 / 16)).astype(int)
    square = taken[rows][:, columns].transpose(2, 0, 1) / 255
    mean, std = (
        np.array(values)[:, None, None]
        for values in (
            model.processor.image_processor.image_mean,
            model.processor.image_processor.image_std,
        )
    )
    assert pixels.shape == (1, 3, 16, 16)
    assert np.allclose(pixels[0].numpy(), (square - mean) / std, atol=1e-5)


def test_media_features_refuses_counts_that_do_not_fit(model: VideoChatGpt) -> None:
    frames = torch.zeros(2, 3, 16, 16)
    for counts in ([2, 0], [3]):
        with pytest.raises(ValueError, match=rf"frame_counts is {re.escape(str(counts))}, but pixel_values has 2"):
            model.media_features(frames, torch.tensor(counts))
    with pytest.raises(
        ValueError, match="1 rows are given by media and 0 by features, but has_features tells of 1 and 1"
    ):
        model.media_features(frames, torch.tensor([2]), None, torch.tensor([False, True]))


def test_save_and_open(model: VideoChatGpt, tmp_path: Path) -> None:
    model.save_trained(tmp_path)
    opened = open_model(tmp_path)
    assert isinstance(opened, VideoChatGpt)
    assert (opened.config.num_frames, opened.config.chat_template) == (FRAMES, "video-chatgpt_v1")
    batch = inputs_of(model, ask(clip(9)))
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, opened(**inputs_of(opened, ask(clip(9)))).loss)
    assert opened.trained_state().keys() == {"connector.weight", "connector.bias", "markers.weight"}


def test_open_refuses_another_encoder(
    model: VideoChatGpt, write_encoder: Callable[..., Path], write_llm: Callable[..., Path], tmp_path: Path
) -> None:
    model.save_trained(tmp_path)
    with pytest.raises(ValueError, match="reads features 32 wide, your encoder gives 64"):
        open_model(tmp_path, encoder=write_encoder(hidden_size=64))
    with pytest.raises(ValueError, match="is for 48, your language model is 32"):
        open_model(tmp_path, llm=write_llm(hidden_size=32))


def test_chat_shows_a_video_after_the_question(model: VideoChatGpt) -> None:
    session = ChatSession(model, max_new_tokens=4)
    first = session.send("what?", videos=[clip(9)])
    assert first == answer_batch(model, [ask(clip(9), answer=None)], 1, 4)[0] != ""
    assert [part["type"] for part in session.messages[0]["content"]] == ["text", "video"]
    second = session.send("and?")
    earlier = ask(clip(9), answer=first)["messages"]
    sample = {"id": "chat", "messages": [*earlier, {"role": "user", "content": "and?"}]}
    assert second == answer_batch(model, [sample], 1, 4)[0]


def test_chat_refuses_what_is_no_video(model: VideoChatGpt, tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "song.wav").write_bytes(b"RIFF\x24\x00\x00\x00WAVE")
    for videos, message in [
        ([tmp_path / "song.wav"], "cannot read video"),
        ([tmp_path / "none.mp4"], "is not there"),
        ([[]], "expected a path or a sequence of PIL images"),
    ]:
        with pytest.raises(ValueError, match=message):
            ChatSession(model).send("what?", videos=videos)
    with pytest.raises(ValueError, match="part of type 'image'; this model reads text and video"):
        ChatSession(model).send("what?", images=[Image.new("RGB", (16, 16))])


def test_feature_cache_stands_for_the_encoder(model: VideoChatGpt, tmp_path: Path) -> None:
    samples = [ask(clip(9), name="one"), ask(clip(9), "why?", name="same"), ask(clip(2, 2), name="two")]
    expected = inputs_of(model, *samples)
    with torch.no_grad():
        loss = model(**expected).loss
        assert model.fill_feature_cache(tmp_path / "cache", samples) == 2
        assert model.fill_feature_cache(tmp_path / "cache", samples) == 0
        model.encoder.forward = None  # it is not asked
        batch = inputs_of(model, *samples)
        assert "pixel_values" not in batch
        assert batch["has_features"].tolist() == [True, True, True]
        assert torch.allclose(model(**batch).loss, loss, rtol=1e-6)


def test_feature_cache_of_files(model: VideoChatGpt, tmp_path: Path) -> None:
    media, cache = tmp_path / "media", tmp_path / "cache"
    media.mkdir()
    clip(1)[0].save(media / "a.png")
    assert model.fill_feature_cache(cache, [ask("a.png")], media) == 1
    assert model.fill_feature_cache(cache, [ask("a.png")], media) == 0
    clip(1, seed=1)[0].resize((20, 20)).save(media / "a.png")
    assert model.fill_feature_cache(cache, [ask("a.png")], media) == 1


def test_feature_cache_knows_weights_layer_and_preprocessing(
    model: VideoChatGpt, llm: Path, encoder: Path, write_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    samples = [ask(clip(9))]
    assert model.fill_feature_cache(tmp_path, samples) == 1
    others = [
        VideoChatGpt.from_parts(llm, write_encoder(), num_frames=FRAMES),
        VideoChatGpt.from_parts(llm, encoder, num_frames=FRAMES, vision_feature_layer=-1),
        VideoChatGpt.from_parts(llm, encoder, num_frames=FRAMES - 1),
        VideoChatGpt.from_parts(llm, encoder, dtype=torch.bfloat16, num_frames=FRAMES),
    ]
    assert [other.fill_feature_cache(tmp_path, samples) for other in others] == [1, 1, 1, 1]
    same = VideoChatGpt.from_parts(llm, encoder, num_frames=FRAMES)
    assert same.fill_feature_cache(tmp_path, samples) == 0


def test_feature_cache_shares_the_work(model: VideoChatGpt, tmp_path: Path) -> None:
    samples = [ask(clip(2, seed), name=str(seed)) for seed in range(5)]
    assert [model.fill_feature_cache(tmp_path, samples, None, rank, 2) for rank in range(2)] == [2, 3]
    assert model.fill_feature_cache(tmp_path, samples) == 0


def test_processor_opens_as_it_was_saved(model: VideoChatGpt, tmp_path: Path) -> None:
    processor: Any = model.processor
    processor.save_pretrained(tmp_path)
    opened = type(processor).from_pretrained(tmp_path)
    assert opened.settings() == processor.settings()
    assert opened.encode(ask(clip(3))).input_ids == processor.encode(ask(clip(3))).input_ids
