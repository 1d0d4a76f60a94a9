"""Anyres against transformers' LLaVA-NeXT: grids, pixels, counts of tokens and the order of features."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mmfast.data.anyres import LLAVA_NEXT_PINPOINTS, Anyres, pinpoints_up_to

NEXT = Anyres(LLAVA_NEXT_PINPOINTS, tile_size=336, patches_per_side=24)
SMALL = Anyres(pinpoints_up_to(6, 8), tile_size=8, patches_per_side=4)
# Neither map is left empty by these.
sizes = st.tuples(st.integers(60, 1400), st.integers(60, 1400))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def packed(anyres: Anyres, features: list[torch.Tensor], sizes: list[tuple[int, int]]) -> torch.Tensor:
    """transformers' packing of each image's features [views, P², 1], with the newline -1."""
    vision = {"image_size": anyres.tile_size, "patch_size": anyres.tile_size // anyres.patches_per_side}
    config = LlavaNextConfig(vision_config=vision, image_grid_pinpoints=[list(p) for p in anyres.pinpoints])
    model: Any = SimpleNamespace(config=config)
    packed, _ = LlavaNextModel.pack_image_features(
        model, features, [list(size) for size in sizes], "default", torch.tensor([-1])
    )
    return torch.cat(packed)


@pytest.mark.parametrize(
    ("width", "height", "grid", "tokens"),
    [
        (336, 336, (1, 2), 1176),
        (640, 480, (2, 2), 2340),
        (480, 640, (2, 2), 2352),
        (672, 672, (2, 2), 2928),
        (1024, 1024, (2, 2), 2928),
        (1000, 300, (1, 3), 2182),
        (300, 1000, (3, 1), 2232),
        (1920, 1080, (2, 2), 1948),
    ],
)
def test_published_counts(width: int, height: int, grid: tuple[int, int], tokens: int) -> None:
    size = (height, width)
    assert NEXT.grid(size) == grid
    assert NEXT.num_tokens(size) == tokens
    tiles = grid[0] * grid[1]
    assert NEXT.num_views(size) == 1 + tiles
    for merge in ("flat", "spatial"):
        other = Anyres(LLAVA_NEXT_PINPOINTS, 336, 24, merge)
        assert other.num_tokens(size) == len(other.feature_index([size])) == 576 * (1 + tiles)


@settings(max_examples=300, deadline=None)
@given(sizes)
def test_grid_and_count_are_transformers(size: tuple[int, int]) -> None:
    image_processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, image_grid_pinpoints=LLAVA_NEXT_PINPOINTS)
    theirs: Any = SimpleNamespace(image_processor=image_processor, patch_size=14, num_additional_image_tokens=1)
    for name in ("_get_unpadded_features", "_get_number_of_features"):
        setattr(theirs, name, getattr(LlavaNextProcessor, name).__get__(theirs))
    canvas = select_best_resolution(size, [list(p) for p in LLAVA_NEXT_PINPOINTS])
    assert NEXT.grid(size) == (canvas[0] // 336, canvas[1] // 336)
    assert NEXT.num_tokens(size) == theirs._get_number_of_features(*size, 336, 336) - 1


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=4), st.sampled_from([NEXT, SMALL]))
def test_order_of_features_is_transformers(sizes: list[tuple[int, int]], anyres: Anyres) -> None:
    area = anyres.patches_per_side**2
    counts = [anyres.num_views(size) for size in sizes]
    features = torch.arange(sum(counts) * area).view(-1, area, 1)
    expected = packed(anyres, list(features.split(counts)), sizes)
    rows = torch.cat([features.flatten(), torch.tensor([-1])])
    assert torch.equal(rows[anyres.feature_index(sizes)], expected.flatten())
    assert sum(map(anyres.num_tokens, sizes)) == len(expected)


@pytest.mark.parametrize("size", [(13, 9), (8, 8), (5, 31), (16, 16), (40, 7), (100, 90), (2, 3)])
def test_views_are_transformers_pixels(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=pinpoints_up_to(6, 8)
    )
    expected = theirs.preprocess([Image.fromarray(noise)], image_grid_pinpoints=[list(p) for p in SMALL.pinpoints])
    views = SMALL.views(Image.fromarray(noise), Image.Resampling.BICUBIC)
    assert len(views) == SMALL.num_views(size)
    pixels = np.stack([np.asarray(view) for view in views]).astype(np.float32) / 255
    ours = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), expected["pixel_values"][0], atol=1e-6)


def test_flat_and_spatial_order() -> None:
    """Two tiles of 2x2 patches side by side; the whole has the places 0 to 3, the tiles 4 to 7 and 8 to 11."""
    sizes = [(8, 16)]
    arguments: Any = (((8, 16),), 8, 2)
    assert Anyres(*arguments, "flat").feature_index(sizes).tolist() == list(range(12))
    assert Anyres(*arguments, "spatial").feature_index(sizes).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    assert Anyres(*arguments).feature_index(sizes).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 12, 6, 7, 10, 11, 12]
    assert Anyres(*arguments).feature_index([]).tolist() == []


@pytest.mark.parametrize("size", [(176, 110), (88, 99), (704, 396)])
def test_rounding_of_the_original(size: tuple[int, int]) -> None:
    """The content is an odd number of columns wide; floating point falls short of it, and the original floors that."""
    height, width = size
    rows, columns = (24 * n for n in NEXT.grid(size))
    content = width * rows // height  # exactly
    assert content * height == width * rows and content % 2
    assert int(width * (rows / height)) == content - 1
    assert (columns - content) // 2 == (columns - content + 1) // 2 - 1
    assert NEXT.num_tokens(size) == 576 + rows * (columns - 2 * ((columns - content) // 2) + 1)
    original = Anyres(LLAVA_NEXT_PINPOINTS, 336, 24, rounding="original")
    expected = 576 + rows * (columns - 2 * ((columns - content + 1) // 2) + 1)
    assert original.num_tokens(size) == len(original.feature_index([size])) == expected


def test_pinpoints_of_llava_1_5_hd() -> None:
    grids = {(height // 224, width // 224) for height, width in pinpoints_up_to(6, 224)}
    lines = {(1, n) for n in range(1, 7)} | {(n, 1) for n in range(1, 7)}
    assert grids == lines | {(2, 2), (2, 3), (3, 2)}
    assert len(pinpoints_up_to(6, 224)) == len(grids)


@pytest.mark.parametrize("pinpoints", [[], [[336, 500]], [[336]], [336, 672], [[0, 336]], [[336.0, 336]], ["ab"]])
def test_refuses_canvases_that_tiles_do_not_fill(pinpoints: Any) -> None:
    with pytest.raises(ValueError, match=r"image_grid_pinpoints (is empty|has .*); pairs .* multiples .* 336 pixels"):
        Anyres(pinpoints, 336, 24)


def test_refuses_unknown_rules() -> None:
    with pytest.raises(ValueError, match="merge is 'maxpool'"):
        Anyres(LLAVA_NEXT_PINPOINTS, 336, 24, "maxpool")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounding 'up'"):
        Anyres(LLAVA_NEXT_PINPOINTS, 336, 24, rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patches_per_side 0"):
        Anyres(LLAVA_NEXT_PINPOINTS, 336, 0)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4)])
def test_refuses_an_image_without_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="one pixel at least"):
        NEXT.num_tokens(size)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_refuses_an_image_without_breadth(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="too long for high resolution"):
        NEXT.num_tokens(size)
    with pytest.raises(ValueError, match="cut the image"):
        NEXT.feature_index([size])
