"""Video-ChatGPT: means of CLIP's features over each frame's patches and over the frames, projected, as words.

A video becomes its learned start, one row for each frame (zeros, projected, for those that a short video lacks), one
for each patch, and its learned end. The linear connector, the start and the end are all that trains.

Source: Maaz et al., "Video-ChatGPT" (arXiv 2306.05424); https://github.com/mbzuai-oryx/Video-ChatGPT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mmfast.encoders import ClipEncoder
from mmfast.models.base import MultimodalModel
from mmfast.models.parts import (
    as_config,
    open_language_model,
    open_processor,
    resolve_language_model,
)
from mmfast.models.stages import Stage
from mmfast.models.video_chatgpt_original import read_original, write_original
from mmfast.nn import SpatioTemporalPool

if TYPE_CHECKING:
    from mmfast.data.samples import Sample
    from mmfast.data.video_processor import VideoProcessor

__all__ = ["VideoChatGpt", "VideoChatGptConfig"]

_FRAMES_AT_ONCE = 128


class VideoChatGptConfig(PreTrainedConfig):
    """Configuration of `VideoChatGpt`.

    Args:
        text_config: Configuration of the language model, or its dict.
        vision_config: Configuration of the CLIP vision tower, or its dict.
        num_frames: Temporal rows of a video, and the most frames that are read of it.
        vision_feature_layer: Index of the tower's hidden states that are pooled, without the class token.
        chat_template: Name of the conversation template that questions are asked with; training has its own.
        image_token_id: Id that marks the place of a row; it may lie beyond the vocabulary.
    """

    model_type = "mmfast_video_chatgpt"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_frames: int = 100,
        vision_feature_layer: int = -2,
        chat_template: str = "video-chatgpt_v1",
        image_token_id: int = 32003,
        **kwargs: Any,
    ) -> None:
        self.text_config = as_config(text_config, "llama")
        self.vision_config = as_config(vision_config, "clip_vision_model")
        self.num_frames = num_frames
        self.vision_feature_layer = vision_feature_layer
        self.chat_template = chat_template
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


class VideoChatGpt(MultimodalModel):
    """Video-ChatGPT.

    `VideoChatGpt(config)` has random weights; `from_parts` puts a fresh connector between two pretrained models;
    `from_pretrained` opens a trained one.

    Args:
        config: The configuration.
        encoder: The encoder; None builds one from the configuration. Likewise the language model.
        language_model: The language model.
        processor: Turns samples into batches.
    """

    config_class = VideoChatGptConfig
    system = "video_chatgpt"
    settings = ("num_frames", "vision_feature_layer", "chat_template")
    media_inputs = ("pixel_values", "frame_counts", "video_features")
    parts = ("encoder", "connector", "markers", "language_model")
    frozen_parts = ("encoder", "language_model")

    connector: nn.Linear

    def __init__(
        self,
        config: VideoChatGptConfig,
        encoder: ClipEncoder | None = None,
        language_model: PreTrainedModel | None = None,
        processor: VideoProcessor | None = None,
    ) -> None:
        if encoder is None:
            encoder = ClipEncoder.from_config(config.vision_config, config.vision_feature_layer)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        words: Tensor = cast(Any, language_model.get_input_embeddings()).weight
        connector = nn.Linear(encoder.hidden_size, words.shape[1])
        super().__init__(config, encoder, connector, language_model, processor)
        self.pool = SpatioTemporalPool(config.num_frames)
        # The start and the end of a video begin as the mean of all words.
        self.markers = nn.Embedding(2, words.shape[1])
        if not words.is_meta:
            self.markers.weight.data.copy_(words.detach().float().mean(0).expand(2, -1))
        self.trained_parts = {"connector", "markers"}

    @classmethod
    def from_parts(  # type: ignore[override]
        cls,
        llm: str | Path,
        encoder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        num_frames: int = 100,
        vision_feature_layer: int = -2,
        chat_template: str = "video-chatgpt_v1",
    ) -> VideoChatGpt:
        """Puts a fresh connector between a pretrained language model and a pretrained vision tower.

        Args:
            llm: Folder of a causal language model with its tokenizer, or "world" for the shipped one.
            encoder: Folder of a CLIP model with its image processor, or "world" for the shipped one.
            dtype: Dtype of the two pretrained models; what trains is made in float32.
            num_frames: Temporal rows of a video, and the most frames that are read of it.
            vision_feature_layer: Index of the tower's hidden states that are pooled.
            chat_template: Name of the conversation template that questions are asked with.

        Raises:
            FileNotFoundError: If a folder does not exist.
            ValueError: If a folder lacks weights, or there is no such template.
        """
        vision = ClipEncoder.from_pretrained(ClipEncoder.resolve(encoder), vision_feature_layer, dtype=dtype)
        language_model = open_language_model(resolve_language_model(llm), dtype)
        return cls._join(llm, encoder, vision, language_model, num_frames, chat_template)

    @classmethod
    def _join(
        cls,
        llm: str | Path,
        encoder: str | Path,
        vision: ClipEncoder,
        language_model: PreTrainedModel,
        num_frames: int,
        chat_template: str,
    ) -> VideoChatGpt:
        from mmfast.data.video_processor import VideoProcessor

        processor = cast(
            VideoProcessor,
            open_processor(
                resolve_language_model(llm),
                ClipEncoder.resolve(encoder),
                "vicuna_v1",
                num_frames + vision.num_patches + 2,
                VideoProcessor,
                num_frames=num_frames,
                chat_template=chat_template,
            ),
        )
        config = VideoChatGptConfig(
            text_config=language_model.config,
            vision_config=vision.config,
            num_frames=num_frames,
            vision_feature_layer=vision.layer,
            chat_template=chat_template,
            image_token_id=processor.image_token_id,
        )
        model = cls(config, vision, language_model, processor)
        model.name_bases(llm=llm, encoder=encoder)
        return model

    @classmethod
    def from_original(
        cls,
        source: str | Path,
        llm: str | Path,
        encoder: str | Path,
        *,
        template: str | None = None,
        dtype: str = "float32",
    ) -> tuple[VideoChatGpt, dict[str, str]]:
        """See `MultimodalModel.from_original`; `source` is the published `video_chatgpt-7B.bin` or the like."""
        from mmfast.models.architectures import text_config_named, vision_config_named

        text, vision_config = text_config_named(llm), vision_config_named(encoder)
        state, names = read_original(Path(source).expanduser(), text.vocab_size, text.hidden_size, vision_config)
        # The frozen parts only say what they are; the meta device gives them no memory.
        with torch.device("meta"):
            vision = ClipEncoder.from_config(vision_config)
            language_model = AutoModelForCausalLM.from_config(text, dtype=getattr(torch, dtype))
        model = cls._join(llm, encoder, vision, language_model, 100, template or "video-chatgpt_v1")
        model.load_trained_state(state)
        return model, names

    def to_original(self, folder: str | Path) -> dict[str, str]:
        """Writes `mm_projector.bin` as the original's training does; see `MultimodalModel.to_original`."""
        return write_original(self, Path(folder).expanduser())

    def stages(self) -> dict[str, Stage]:
        """The published one, "instruct"."""
        # docs/train_video_chatgpt.md; one learning rate for all that trains.
        return {"instruct": Stage("instruct", "vicuna_v1", {"connector": 2e-5, "markers": 2e-5})}

    @property
    def features_per_medium(self) -> int:
        """Rows of a video: its start, the temporal and the spatial ones, its end."""
        return self.config.num_frames + self.encoder.num_patches + 2

    def example_media(self, count: int) -> tuple[dict[str, Tensor], int]:
        """As in `MultimodalModel`, with the frames of videos."""
        frames = self.config.num_frames
        media = super().example_media(count * frames)[0]
        return {**media, "frame_counts": torch.full((count,), frames)}, self.features_per_medium

    def media_features(
        self,
        pixel_values: Tensor | None = None,
        frame_counts: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> Tensor:
        """Maps the videos of a batch to their rows, one video after the other.

        Args:
            pixel_values: Frames [sum of frame_counts, 3, S, S] of the videos that are given by frames.
            frame_counts: [n] int64, for each video its frames; 0 for one that is given by its features. None: every
                video is given by its features.
            video_features: Pooled features [m, num_frames + P, D] of the latter, in their order.

        Returns:
            [n · features_per_medium, C].

        Raises:
            ValueError: If the frames or the features are not those that `frame_counts` tells of.
        """
        given = [] if video_features is None else list(video_features)
        counts = [0] * len(given) if frame_counts is None else frame_counts.tolist()
        frames = 0 if pixel_values is None else len(pixel_values)
        if sum(counts) != frames or counts.count(0) != len(given):
            raise ValueError(
                f"{type(self).__name__}: frame_counts is {counts}, but there are {frames} frames and the features of "
                f"{len(given)} videos; a frame for each that is counted and features for each 0 are accepted; let the "
                "processor make them"
            )
        pooled = iter(self.pool_frames(pixel_values, [count for count in counts if count]) if frames else [])
        features = [next(pooled) if count else given.pop(0) for count in counts]
        weight: Tensor = self.connector.weight
        rows = self.connector(torch.stack([video.to(weight.device, weight.dtype) for video in features]))
        start, end = (marker.expand(len(rows), 1, -1) for marker in self.markers.weight)
        return torch.cat([start, rows, end], dim=1).flatten(0, 1)

    def pool_frames(self, pixel_values: Any, counts: list[int]) -> list[Tensor]:
        """The pooled features [num_frames + P, D] of videos of `counts` frames each, in the encoder's dtype."""
        features = torch.cat([self.encoder(chunk) for chunk in pixel_values.split(_FRAMES_AT_ONCE)])
        return [self.pool(video[None])[0] for video in features.split(counts)]

    def fill_feature_cache(
        self,
        folder: str | Path,
        samples: Iterable[Sample],
        media_folder: str | Path | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> int:
        """Puts the pooled features of all videos of `samples` on the disk, and has the processor read them there.

        The encoder is frozen and sees the same frames in every epoch, so nothing of what trains changes; it then
        runs once per video. Features of another encoder, layer, dtype or preprocessing have other keys, and
        damaged files are made again.

        Args:
            folder: The cache's folder; other runs may share it.
            samples: Their videos, other than files of features, are encoded where they are not in the cache.
            media_folder: Where the samples' paths start.
            rank: Number of this process. It encodes every `world_size`-th video.
            world_size: Number of processes.

        Returns:
            How many videos this process encoded.

        Raises:
            ValueError: As `VideoProcessor.read_media`.
        """
        from mmfast.data.features import FeatureCache
        from mmfast.data.samples import content_parts
        from mmfast.data.video_processor import FEATURE_FILE

        processor = cast(Any, self.processor)
        cache = FeatureCache(folder, f"{_fingerprint(self.encoder)}\n{processor.preprocessing()}")
        # Read without the cache, which would answer for what is to be made.
        processor.cache = None
        encoded, seen = 0, set()
        for sample in samples:
            for part in (part for message in sample["messages"] for part in content_parts(message)):
                if part["type"] != "video" or str(part["video"]).endswith(FEATURE_FILE):
                    continue
                key = processor.cache_key(part, media_folder, sample["id"])
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) % world_size == rank and cache.get(key) is None:
                    frames = processor.read_media(part, media_folder, sample["id"])
                    cache.put(key, self.pool_frames(frames.to(self.device), [len(frames)])[0])
                    encoded += 1
        processor.cache = cache
        return encoded


def _fingerprint(encoder: ClipEncoder) -> str:
    """What decides the encoder's features: the weights that run, their dtype and the layer."""
    digest = hashlib.sha256(f"{encoder.layer} {encoder.select}".encode())
    for name, tensor in sorted(encoder.tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
