"""High resolution (anyres): an image becomes tiles of the encoder's size beside a view of the whole.

Everything here follows from the size of the image alone, so tokens are counted before a pixel is decoded. Sizes are
(height, width) throughout.

Source: LLaVA-NeXT as in transformers `models/llava_next` and, where its rules differ, as in
https://github.com/haotian-liu/LLaVA `llava/mm_utils.py`, `llava/model/llava_arch.py` (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

Merge: TypeAlias = Literal["spatial_unpad", "spatial", "flat"]

LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The canvases of LLaVA-NeXT (v1.6), for tiles of 336 pixels."""


def pinpoints_up_to(max_tiles: int, tile_size: int) -> tuple[tuple[int, int], ...]:
    """The canvases (height, width) of all grids of at most `max_tiles` tiles.

    With 6 tiles of 224 pixels: those of LLaVA-1.5-HD, 1x1 to 1x6, 2x2, 2x3 and their transposes.

    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", section 3.4 and appendix A.
    """
    return tuple(
        (rows * tile_size, columns * tile_size)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
    )


@dataclass(frozen=True)
class Anyres:
    """How images of any size are cut into views, and in which order the features of the views are read.

    An image is resized into the best of the canvases, centred there on black, and cut into tiles row by row. Its
    views are the whole image, squeezed to one tile, and then the tiles.

    Args:
        pinpoints: the canvases (height, width) in pixels, in order of preference; multiples of `tile_size`.
        tile_size: side S of the encoder's input in pixels.
        patches_per_side: side P of the encoder's grid of features; there is no class token among them.
        merge: what follows the P² features of the whole. "spatial_unpad": the rows of all tiles' common map, without
            those of the black border, each row ended by the newline embedding. "spatial": the whole map, without
            newlines. "flat": tile after tile.
        rounding: how the border is found. "transformers" rounds away the noise of floating point before it floors,
            "original" does not. (They differ on rare sizes.)

    Raises:
        ValueError: no canvas; one that is not a multiple of the tile; an unknown merge or rounding.
    """

    pinpoints: Sequence[Sequence[int]]
    tile_size: int
    patches_per_side: int
    merge: Merge = "spatial_unpad"
    rounding: Literal["transformers", "original"] = "transformers"

    def __post_init__(self) -> None:
        if self.tile_size < 1 or self.patches_per_side < 1:
            raise ValueError(
                f"anyres: tile_size is {self.tile_size} and patches_per_side {self.patches_per_side}; both must be >= 1"
            )
        accepted = f"pairs (height, width) of multiples of the tile's {self.tile_size} pixels are accepted"
        if not self.pinpoints:
            raise ValueError(f"anyres: image_grid_pinpoints is empty; {accepted}, one at least")
        for canvas in self.pinpoints:
            if not _is_canvas(canvas, self.tile_size):
                raise ValueError(f"anyres: image_grid_pinpoints has {canvas!r}; {accepted}")
        if self.merge not in get_args(Merge) or self.rounding not in ("transformers", "original"):
            raise ValueError(
                f"anyres: merge is {self.merge!r} and rounding {self.rounding!r}; accepted are "
                f"{', '.join(get_args(Merge))}, and transformers, original"
            )
        # Equal canvases make equal rules, whether they come from JSON or from Python.
        object.__setattr__(self, "pinpoints", tuple(tuple(canvas) for canvas in self.pinpoints))

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tiles for an image of this size.

        The best canvas keeps the most pixels of the image, none counted that is made up by enlarging; among equals
        the smallest, then the first.

        Raises:
            ValueError: a side of the image is below 1.
        """
        height, width = _checked(size)

        def merit(canvas: Sequence[int]) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        best = max(self.pinpoints, key=merit)  # the first of the best
        return best[0] // self.tile_size, best[1] // self.tile_size

    def num_views(self, size: Sequence[int]) -> int:
        """Encoder inputs of an image of this size: the whole and its tiles."""
        rows, columns = self.grid(size)
        return 1 + rows * columns

    def num_tokens(self, size: Sequence[int]) -> int:
        """Tokens of an image of this size in the language model.

        Raises:
            ValueError: the image is so long that nothing is left of its map without the border.
        """
        top, bottom, left, right = self._content(size)
        newlines = bottom - top if self.merge == "spatial_unpad" else 0
        return self.patches_per_side**2 + (bottom - top) * (right - left) + newlines

    def feature_index(self, sizes: Sequence[Sequence[int]]) -> Tensor:
        """The order in which the features of images are read, one image after the other.

        Args:
            sizes: height and width in pixels of each image.

        Returns:
            int64 [sum of num_tokens] into the rows of [all views · P² features, then the newline embedding].

        Raises:
            ValueError: as `num_tokens`.
        """
        area = self.patches_per_side**2
        end = area * sum(map(self.num_views, sizes))
        parts, start = [], 0
        for size in sizes:
            tiles = self._tiles_index(size, newline=end - start - area)
            parts += [torch.arange(start, start + area), start + area + tiles]
            start += area * self.num_views(size)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def views(self, image: Image, resample: Resampling | int) -> list[Image]:
        """The whole image and its tiles, RGB images of S x S pixels each.

        Args:
            image: RGB.
            resample: filter of Pillow to resize with.
        """
        import PIL.Image

        tile, size = self.tile_size, (image.height, image.width)
        rows, columns = self.grid(size)
        height, width = _fitted(size, (rows * tile, columns * tile))
        canvas = PIL.Image.new("RGB", (columns * tile, rows * tile))
        corner = ((canvas.width - width) // 2, (canvas.height - height) // 2)
        canvas.paste(image.resize((width, height), resample), corner)
        corners = [(column * tile, row * tile) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]
        return [image.resize((tile, tile), resample), *tiles]

    def _tiles_index(self, size: Sequence[int], newline: int) -> Tensor:
        """The order in which the features [rows · columns · P²] of an image's tiles are read."""
        side = self.patches_per_side
        rows, columns = self.grid(size)
        places = torch.arange(rows * columns * side * side)
        if self.merge == "flat":
            return places
        # From (tile, row in the tile, column in the tile) to (row, column) of the common map.
        places = places.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
        if self.merge == "spatial_unpad":
            top, bottom, left, right = self._content(size)
            places = torch.nn.functional.pad(places[top:bottom, left:right], (0, 1), value=newline)
        return places.flatten()

    def _content(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of the part of the map that is read.

        The border is floored on both sides, the resized image is not, and so a row or a column of the border may stay.
        """
        rows, columns = self.grid(size)
        map_height, map_width = rows * self.patches_per_side, columns * self.patches_per_side
        if self.merge != "spatial_unpad":
            return 0, map_height, 0, map_width
        height, width = size
        top = left = 0
        if width / height > map_width / map_height:
            top = (map_height - self._floor(height * (map_width / width))) // 2
        else:
            left = (map_width - self._floor(width * (map_height / height))) // 2
        if 2 * top >= map_height or 2 * left >= map_width:
            raise ValueError(
                f"anyres: an image of {width}x{height} pixels is too long for high resolution: without its border "
                f"nothing is left of the map of {map_width}x{map_height} features; cut the image into parts"
            )
        return top, map_height - top, left, map_width - left

    def _floor(self, length: float) -> int:
        return int(round(length, 7) if self.rounding == "transformers" else length)


def _is_canvas(value: object, tile_size: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(side, int) and side > 0 and side % tile_size == 0 for side in value)
    )


def _fitted(size: Sequence[int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the image where it just fits into the canvas; the shorter side is rounded up."""
    (height, width), (canvas_height, canvas_width) = size, canvas
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_y), canvas_width)


def _checked(size: Sequence[int]) -> tuple[int, int]:
    height, width = int(size[0]), int(size[1])
    if height < 1 or width < 1:
        raise ValueError(f"anyres: an image has {width}x{height} pixels; one pixel at least along each side is needed")
    return height, width
