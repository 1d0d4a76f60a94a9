"""Video-ChatGPT: means of CLIP's features over each frame's patches and over the frames, projected, as words.

A video becomes its learned start, one row for each frame (zeros, projected, for those that a short video lacks), one
for each patch, and its learned end. The linear connector, the start and the end are all that trains.

Source: Maaz et al., "Video-ChatGPT" (arXiv 2306.05424); https://github.com/mbzuai-oryx/Video-ChatGPT.
"""

from __future__ import annotations

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
    resolve_language_model,
)
from mmfast.models.stages import Stage
from mmfast.models.video_chatgpt_original import read_original, write_original
from mmfast.nn import SpatioTemporalPool

if TYPE_CHECKING:
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
    media_inputs = ("pixel_values", "frame_counts")
    host_inputs = (*MultimodalModel.host_inputs, "frame_counts")
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
        base_dtype: str | None = None,
        num_frames: int = 100,
        vision_feature_layer: int = -2,
        chat_template: str = "video-chatgpt_v1",
    ) -> VideoChatGpt:
        """Puts a fresh connector between a pretrained language model and a pretrained vision tower.

        Args:
            llm: Folder of a causal language model with its tokenizer, or "world" for the shipped one.
            encoder: Folder of a CLIP model with its image processor, or "world" for the shipped one.
            dtype: Dtype of the two pretrained models; what trains is made in float32.
            base_dtype: Format of the language model's frozen linear layers, see `open_language_model`.
            num_frames: Temporal rows of a video, and the most frames that are read of it.
            vision_feature_layer: Index of the tower's hidden states that are pooled.
            chat_template: Name of the conversation template that questions are asked with.

        Raises:
            FileNotFoundError: If a folder does not exist.
            ValueError: If a folder lacks weights, or there is no such template.
        """
        vision = ClipEncoder.from_pretrained(ClipEncoder.resolve(encoder), vision_feature_layer, dtype=dtype)
        language_model = open_language_model(resolve_language_model(llm), dtype, base_dtype)
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
        config = VideoChatGptConfig(
            text_config=language_model.config,
            vision_config=vision.config,
            num_frames=num_frames,
            vision_feature_layer=vision.layer,
            chat_template=chat_template,
        )
        model = cls(config, vision, language_model)
        model.attach_processor(llm, encoder)
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

    def processor_settings(self) -> dict[str, Any]:
        """As in `MultimodalModel`."""
        from mmfast.data.video_processor import VideoProcessor

        frames = {"num_frames": self.config.num_frames, "chat_template": self.config.chat_template}
        tokens = self.features_per_medium
        return {"template": "vicuna_v1", "tokens_per_image": tokens, "kind": VideoProcessor, **frames}

    @property
    def features_per_medium(self) -> int:
        """Rows of a video: its start, the temporal and the spatial ones, its end."""
        return self.config.num_frames + self.encoder.num_patches + 2

    def example_media(self, count: int) -> tuple[dict[str, Tensor], int]:
        """As in `MultimodalModel`, with the frames of videos."""
        frames = self.config.num_frames
        media = super().example_media(count * frames)[0]
        return {**media, "frame_counts": torch.full((count,), frames)}, self.features_per_medium

    def media_features(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        frame_counts: Tensor | None = None,
        features: Tensor | None = None,
        has_features: Tensor | None = None,
    ) -> Tensor:
        """Maps the videos of a batch to their rows, one video after the other.

        Args:
            pixel_values: Frames [sum of frame_counts, 3, S, S] of the videos that are given by frames.
            frame_counts: [n] int64, how many are of each of them.
            features: Pooled features [m, num_frames + P, D] of the others.
            has_features: bool [n + m], which videos are given by features.

        Returns:
            [(n + m) · features_per_medium, C].

        Raises:
            ValueError: If the frames or the features are not those that `frame_counts` and `has_features` tell of.
        """
        frames = {"pixel_values": pixel_values, "frame_counts": frame_counts}
        videos = self._all_features(features, has_features, **frames)
        weight: Tensor = self.connector.weight
        rows = self.connector(videos.to(weight.device, weight.dtype))
        start, end = (marker.expand(len(rows), 1, -1) for marker in self.markers.weight)
        return torch.cat([start, rows, end], dim=1).flatten(0, 1)

    def frozen_features(self, pixel_values: Tensor, frame_counts: Tensor) -> Tensor:  # type: ignore[override]
        """The pooled features [n, num_frames + P, D] of videos of `frame_counts` frames each, in the encoder's dtype.

        Raises:
            ValueError: If the frames are not as many.
        """
        counts = frame_counts.tolist()
        if sum(counts) != len(pixel_values) or 0 in counts:
            raise ValueError(
                f"{type(self).__name__}: frame_counts is {counts}, but pixel_values has {len(pixel_values)} frames; "
                "at least one of each video, and as many as are counted, are accepted; let the processor make them"
            )
        features = torch.cat([self.encoder(chunk) for chunk in pixel_values.split(_FRAMES_AT_ONCE)])
        return torch.stack([self.pool(video[None])[0] for video in features.split(counts)])
