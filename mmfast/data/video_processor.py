"""Video-ChatGPT's processor: a clip becomes frames for the encoder, or the features of a file or a cache."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.data.features import Features, read_pickled_features
from mmfast.data.images import image_digest, resolve_media
from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import MediaPart, Sample, VideoPart
from mmfast.data.templates import Template, get_template
from mmfast.data.videos import frame_indices, load_video

if TYPE_CHECKING:
    from PIL.Image import Image

FEATURE_FILE = ".pkl"
"""How the name of a file of features ends."""
_OF_IMAGES = ("pad_to_square", "media_first")


class VideoProcessor(Processor):
    """Reads videos: `num_frames` frames each, squashed to the encoder's square as published.

    A video whose name ends in `.pkl` is a file of pooled features, see `read_pickled_features`.

    Args:
        tokenizer: as in `Processor`, with the next two.
        image_processor: of the encoder; its crop size is the side of the square.
        template: the template that training data is rendered with.
        image_token: stands for every embedding of a video.
        tokens_per_image: embeddings of a video: its start, one for each of `num_frames` frames and each patch, its end.
        max_length: as in `Processor`.
        num_frames: the most frames that are read of a video.
        chat_template: name of the template that questions are asked with; None: `template`.
    """

    media_kinds: ClassVar[tuple[str, ...]] = ("video",)
    adjustable: ClassVar[tuple[str, ...]] = ("max_length",)

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        template: Template,
        image_token: str = "<vid_patch>",
        tokens_per_image: int = 358,
        max_length: int = 2048,
        num_frames: int = 100,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, image_processor, template, image_token, tokens_per_image, max_length)
        self.num_frames = num_frames
        self.chat_template = chat_template
        self.side: int = image_processor.crop_size["height"]

    def settings(self) -> dict[str, Any]:
        """Arguments of the class beside tokenizer and image processor, the templates by name."""
        settings = {name: value for name, value in super().settings().items() if name not in _OF_IMAGES}
        return {**settings, "num_frames": self.num_frames, "chat_template": self.chat_template}

    def encode(
        self,
        sample: Sample,
        add_generation_prompt: bool = False,
        media_folder: str | os.PathLike[str] | None = None,
        load_media: bool = True,
    ) -> Encoded:
        """As `Processor.encode`, a question (`add_generation_prompt`) with `chat_template`."""
        if not add_generation_prompt or self.chat_template is None:
            return super().encode(sample, add_generation_prompt, media_folder, load_media)
        asking = copy.copy(self)
        asking.template, asking.chat_template = get_template(self.chat_template), None
        return asking.encode(sample, add_generation_prompt, media_folder, load_media)

    def read_media(
        self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str
    ) -> Tensor | Features:
        """A video: float32 frames [t, 3, S, S], or the features of a file.

        Raises:
            ValueError: as `load_video` or `read_pickled_features`, naming the sample.
        """
        if _is_feature_file(part):
            path = resolve_media(cast(Any, part)["video"], media_folder, sample_id, "video")
            try:
                # Without the start and the end, which are the model's own.
                return Features(read_pickled_features(path, self.tokens_per_image - 2)[None])
            except ValueError as error:
                raise ValueError(f"sample '{sample_id}': {error}") from error
        video = cast(VideoPart, part)
        frames = cast("list[Image]", load_video(video, media_folder, sample_id, self.num_frames, self._squash))
        pixels: Tensor = self.image_processor(images=frames, return_tensors="pt")["pixel_values"]
        return pixels.to(torch.float32)

    def pictures(self, medium: Tensor) -> Tensor:
        """The frames of a video, see `Processor.pictures`; none where it is given by its features."""
        return super().pictures(medium if medium.dim() == 4 else torch.empty(0, 3, self.side, self.side))

    def collate_media(self, media: Sequence[Tensor]) -> dict[str, Tensor]:
        """`pixel_values` float32 [all frames, 3, S, S] and `frame_counts` int64 [n], how many are of each video."""
        return {"pixel_values": torch.cat(list(media)), "frame_counts": torch.tensor([len(video) for video in media])}

    def cache_key(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> str | None:
        """As in `Processor`; None for a file of features."""
        return None if _is_feature_file(part) else super().cache_key(part, media_folder, sample_id)

    def _key_in_memory(self, part: MediaPart, sample_id: str) -> str:
        frames = cast(Any, part)["video"]
        return image_digest(frames[index] for index in frame_indices(len(frames), self.num_frames))

    def preprocessing(self) -> str:
        """As in `Processor`."""
        return f"{self.num_frames} frames, nearest to {self.side}, {self.image_processor.to_json_string()}"

    def _squash(self, frame: Image) -> Image:
        """The frame as a square of the encoder's size, by nearest neighbour; its proportions are not kept.

        Source: Video-ChatGPT `video_chatgpt/eval/model_utils.py`, `F.interpolate` without a mode.
        """
        import numpy as np
        import PIL.Image

        if frame.size == (self.side, self.side):
            return frame
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
        squashed = F.interpolate(pixels, size=(self.side, self.side), mode="nearest")
        return PIL.Image.fromarray(squashed[0].permute(1, 2, 0).contiguous().numpy())


def _is_feature_file(part: MediaPart) -> bool:
    source = cast(Any, part)["video"]
    return isinstance(source, str) and source.endswith(FEATURE_FILE)
