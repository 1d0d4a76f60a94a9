"""Captions of images as samples: MiniGPT-4's curated descriptions, and plain pairs of an image and a caption.

Source: Zhu et al., "MiniGPT-4" (arXiv 2304.10592), section 3.2; Vision-CAIR/MiniGPT-4 `prompts/alignment.txt`,
`minigpt4/datasets/builders/image_text_pair_builder.py`, `minigpt4/processors/blip_processors.py` (BSD-3-Clause).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfast.data.samples import Sample

ALIGNMENT_PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""What MiniGPT-4's second stage asks."""

MAX_WORDS = 50


def from_caption(record: Mapping[str, Any], name: str, index: int, where: str) -> Sample:
    """A sample from a record with a caption.

    A record of MiniGPT-4's `filter_cap.json`, {"image_id", "caption"}, is about `image/<image_id>.jpg`, and its caption
    stays as it is. A pair {"image", "caption"} is of the first stage: its caption goes through `clean_caption`. Records
    ask the four `ALIGNMENT_PROMPTS` in turn (the published code draws one for each batch).

    Args:
        record: the record.
        name: id of the sample.
        index: number of the record in its file.
        where: begins the errors.

    Raises:
        ValueError: the record has no caption, or not one image.
    """
    caption, image = record["caption"], record.get("image")
    if (image is None) == (record.get("image_id") is None) or not isinstance(caption, str):
        raise ValueError(
            f"{where} '{name}': its keys are {sorted(record)}; a caption (text) and either image (a path) or image_id, "
            "of image/<image_id>.jpg, are accepted"
        )
    if image is None:
        image = f"image/{record['image_id']}.jpg"
    else:
        caption = clean_caption(caption)
    prompt = ALIGNMENT_PROMPTS[index % len(ALIGNMENT_PROMPTS)]
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
    return {"id": name, "messages": messages}  # type: ignore[typeddict-item]


def clean_caption(caption: str) -> str:
    """A caption as BLIP-2 and MiniGPT-4's first stage learn it: small letters, no . ! " ( ) * # : ; ~, 50 words."""
    text = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])
