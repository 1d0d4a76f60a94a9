"""Pictures of the systems: `python scripts/draw_systems.py` writes docs/pictures/system_*.svg and fills in the pages.

Every number in them is asked of the package, see system_pages.py. tests/test_system_pages.py holds that the committed
files are what this writes.
"""
# ruff: noqa: RUF001  (shapes are written with a multiplication sign)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from system_pages import ROOT, facts, filled_pages

PICTURES = ROOT / "docs" / "pictures"


# ---- what is in each


@dataclass(frozen=True)
class Part:
    """A box: its title, lines below it, and what of it trains (None: it is frozen; "": it has no weights)."""

    title: str
    lines: Sequence[str] = ()
    trains: str | None = None
    width: int = 140
    out: str = ""
    """Shape on the arrow that leaves it; what follows a bar stands below the arrow."""
    chip: str = ""
    """Something trained inside of it."""
    frozen: str = "frozen"
    """What is said where it does not train."""


@dataclass(frozen=True)
class Cell:
    """A piece of the sequence: words, media, an answer that is learned, or a token that trains."""

    text: str
    width: int
    kind: str = "words"


@dataclass(frozen=True)
class Picture:
    """A system: media through its parts (`flow`) into a cell of the sequence or the last chip of the decoder."""

    title: str
    recipes: dict[str, str]
    flow: Sequence[Part]
    cells: Sequence[Cell]
    decoder: Part
    chips: Sequence[Part] = ()
    into_cell: int | None = None
    joins: str | None = None
    """Without a cell: how media meet what is in the last chip."""
    routed: bool = False
    """Whether the first cell decides what the first chip does; chips stand on the left then."""


IMAGE = Part("image", (), "", 66, "3×{a.pixels}×{a.pixels}")
ANSWER = Cell("a cat.</s>", 80, "answer")
VISUAL_BRANCH = Part(
    "visual branch",
    ("{a.options.visual_depth} blocks, {a.options.visual_length} queries",),
    "{a.parts[connector]:,}",
    158,
    "{a.options.visual_length}×{a.width}",
)

DRAWN = {
    "llava": Picture(
        "LLaVA-1.5: patch features, projected, stand among the words",
        {"a": "llava-1.5-pretrain", "lora": "llava-1.5-lora", "full": "llava-1.5"},
        [
            IMAGE,
            Part(
                "CLIP ViT-L/14",
                ("{a.used} of {a.blocks} layers,", "no class token"),
                None,
                158,
                "{a.features}×{a.feature_width}",
            ),
            Part("MLP", ("Linear, GELU, Linear",), "{a.parts[connector]:,}", 158, "{a.tokens}×{a.width}"),
        ],
        [
            Cell("A chat … USER:", 124),
            Cell("{a.tokens} image tokens", 210, "media"),
            Cell("What is this? ASSISTANT:", 176),
            ANSWER,
        ],
        Part("Vicuna, {a.layers} layers", frozen="frozen in the first stage"),
        [
            Part("second stage: all of it", (), "{full.parts[language_model]:,}", 190),
            Part("or LoRA on its linears", (), "{lora.parts[lora]:,}", 190),
        ],
        into_cell=1,
    ),
    "high_resolution": Picture(
        "LLaVA-1.5-HD: the whole and its tiles (here of a picture of 640×480)",
        {"a": "llava-1.5-hd"},
        [
            Part(
                "640×480",
                ("whole, and", "{a.anyres.rows}×{a.anyres.columns} tiles"),
                "",
                84,
                "{a.anyres.views} views|3×{a.pixels}×{a.pixels}",
            ),
            Part(
                "CLIP ViT-L/14", ("each view by itself",), None, 124, "{a.anyres.views}×{a.features}|×{a.feature_width}"
            ),
            Part(
                "MLP, newline",
                ("the newline ends", "each row of the map"),
                "{a.parts[connector]:,}",
                134,
                "{a.anyres.views}×{a.features}|×{a.width}",
            ),
            Part("merge", ("cut off the border,", "end the rows"), "", 112, "{a.anyres.tokens:,}×{a.width}"),
        ],
        [
            Cell("A chat … USER:", 124),
            Cell("{a.anyres.tokens:,} image tokens: the whole, the map", 274, "media"),
            Cell("What is this? …", 120),
            ANSWER,
        ],
        Part("Vicuna, {a.layers} layers", (), "{a.parts[language_model]:,}"),
        into_cell=1,
    ),
    "minigpt4": Picture(
        "MiniGPT-4: a frozen Q-Former asks, one linear map translates",
        {"a": "minigpt4-7b-pretrain"},
        [
            IMAGE,
            Part("EVA ViT-g/14", ("with class token",), None, 118, "{a.features}×{a.feature_width}"),
            Part(
                "Q-Former",
                ("of BLIP-2, {a.q_former.num_queries} queries",),
                None,
                132,
                "{a.q_former.num_queries}×{a.q_former.hidden_size}",
            ),
            Part("Linear", (), "{a.parts[connector]:,}", 118, "{a.tokens}×{a.width}"),
        ],
        [
            Cell("###Human: <Img>", 130),
            Cell("{a.tokens} image tokens", 150, "media"),
            Cell("</Img> What is this? ###Assistant:", 226),
            Cell("a cat.###", 80, "answer"),
        ],
        Part("Vicuna, {a.layers} layers", frozen="frozen in both stages"),
        into_cell=1,
    ),
    "minigpt_v2": Picture(
        "MiniGPT-v2: four patches of a row are one token",
        {"a": "minigpt-v2-7b"},
        [
            IMAGE,
            Part("EVA ViT-g/14", ("at {a.pixels} pixels",), None, 118, "{a.features}×{a.feature_width}"),
            Part("four as one", ("norm, no class token", "no weights"), "", 132, "{a.tokens}×{a.merged}"),
            Part("Linear", (), "{a.parts[connector]:,}", 118, "{a.tokens}×{a.width}"),
        ],
        [
            Cell("[INST] <Img>", 100),
            Cell("{a.tokens} image tokens", 170, "media"),
            Cell("</Img> [vqa] What is this? [/INST]", 230),
            Cell("a cat</s>", 80, "answer"),
        ],
        Part("LLaMA-2-chat, {a.layers} layers"),
        [Part("LoRA on queries and values", (), "{a.parts[lora]:,}", 220)],
        into_cell=1,
    ),
    "video_chatgpt": Picture(
        "Video-ChatGPT: means over each frame, and over all frames",
        {"a": "video-chatgpt-7b"},
        [
            Part(
                "video", ("{a.options.num_frames} frames",), "", 78, "{a.options.num_frames}×3×|{a.pixels}×{a.pixels}"
            ),
            Part(
                "CLIP ViT-L/14",
                ("each frame by itself",),
                None,
                124,
                "{a.options.num_frames}×{a.features}|×{a.feature_width}",
            ),
            Part(
                "two means",
                ("over patches, over", "frames; no weights"),
                "",
                124,
                "({a.options.num_frames}+{a.features})|×{a.feature_width}",
            ),
            Part("Linear", (), "{a.parts[connector]:,}", 104, "({a.options.num_frames}+{a.features})×{a.width}"),
        ],
        [
            Cell("… USER:", 58),
            Cell("start {a.width:,}", 80, "trained"),
            Cell("{a.options.num_frames} frames, {a.features} places", 186, "media"),
            Cell("end {a.width:,}", 76, "trained"),
            Cell("What happens? …", 112),
            Cell("a cat jumps.</s>", 104, "answer"),
        ],
        Part("LLaVA-Lightning's Vicuna, {a.layers} layers"),
        into_cell=2,
    ),
    "llama_adapter_v1": Picture(
        "LLaMA-Adapter V1: prompts inside attention, an image added to all of them",
        {"a": "llama-adapter-v1-7b-images"},
        [
            IMAGE,
            Part("CLIP ViT-L/14", ("class tokens of", "{scales} layers, joined"), None, 158, "1×{a.feature_width}"),
            Part("MLP", ("its width is ours",), "{a.parts[connector]:,}", 158, "1×{a.width}"),
        ],
        [Cell("### Instruction: What is this? ### Response:", 320), ANSWER],
        Part("LLaMA, {a.layers} layers", ("in layers {a.first_prompted} to {a.layers}:",)),
        [
            Part("causal attention", ("to the words",), None, 150),
            Part("+ tanh(gate) · attention", ("to {a.options.prompt_length} prompts",), "{prompted:,}", 200),
        ],
        joins=", added to each",
    ),
    "llama_adapter_v2": Picture(
        "LLaMA-Adapter V2 (paper): an image's prompts come first, learned ones later",
        {"a": "llama-adapter-v2-7b"},
        [
            IMAGE,
            Part("CLIP ViT-L/14", ("all tokens, after", "the last norm"), None, 158, "{a.features}×{a.feature_width}"),
            VISUAL_BRANCH,
        ],
        [Cell("### Instruction: What is this? ### Response:", 320), ANSWER],
        Part("LLaMA, {a.layers} layers"),
        [
            Part("every linear, norm", ("bias and scale, weight",), "{second:,}", 150),
            Part(
                "layers {a.first_prompted} to {a.layers}",
                ("{a.options.prompt_length} prompts, gates",),
                "{prompted:,}",
                150,
            ),
            Part(
                "layer {a.options.visual_layers}",
                ("gates; {a.options.visual_length} of the image",),
                "{a.parts[visual_gates]:,}",
                150,
            ),
        ],
        joins="",
    ),
    "llama_adapter_v2_multimodal": Picture(
        "LLaMA-Adapter V2 (released 7B, LORA-BIAS): an image is added to learned prompts",
        {"a": "llama-adapter-v2-multimodal-lora-7b"},
        [
            IMAGE,
            Part(
                "CLIP ViT-L/14",
                ("all tokens, through", "CLIP's projection"),
                None,
                158,
                "{a.features}×{a.feature_width}",
            ),
            VISUAL_BRANCH,
        ],
        [Cell("### Instruction: What is this? ### Response:", 320), ANSWER],
        Part("LLaMA, {a.layers} layers"),
        [
            Part("second phase", ("norms, biases, LoRA",), "{second:,}", 180),
            Part(
                "first phase",
                ("{a.options.prompt_length} prompts, gates, layers {a.first_prompted} to {a.layers}",),
                "{prompted:,}",
                210,
            ),
        ],
        joins=", added",
    ),
    "lavin": Picture(
        "LaVIN: adapters before every attention, mixed by the modality",
        {"a": "lavin-7b"},
        [
            IMAGE,
            Part(
                "CLIP ViT-L/14",
                ("class tokens of {scales} of {a.blocks} blocks",),
                None,
                196,
                "{a.tokens}×{a.feature_width}",
                "adapters {a.parts[vision_adapters]:,}",
            ),
            Part("MLP", ("Linear, SiLU, Linear",), "{a.parts[connector]:,}", 158, "{a.tokens}×{a.width}"),
        ],
        [
            Cell("modality {a.parts[modality]:,}", 108, "trained"),
            Cell("Image:", 56),
            Cell("{a.tokens} image tokens", 140, "media"),
            Cell("Question: … Response:", 180),
            Cell("The answer is A. …", 130, "answer"),
        ],
        Part("LLaMA, {a.layers} layers"),
        [Part("adapter before each attention", ("two experts, by the modality",), "{a.parts[adapters]:,}", 230)],
        into_cell=2,
        routed=True,
    ),
}


# ---- how they are drawn

WIDTH, MARGIN = 700, 16
FLOW_TOP, FLOW_HEIGHT = 44, 84
STRIP_TOP, STRIP_HEIGHT = 180, 34
DECODER_TOP, DECODER_HEIGHT = 254, 84
HEIGHT = 384
STYLE = """
text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; font-size: 12px; fill: #1b1f24; text-anchor: middle }
.head { font-size: 15px; font-weight: bold; text-anchor: start }
.title { font-size: 13px; font-weight: bold }
.shape { font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; font-size: 11px }
.trains { font-weight: bold; fill: #8a2c0d }
.frozen-word { font-style: italic; fill: #44505c }
.left { text-anchor: start }
.right { text-anchor: end }
.card { fill: #ffffff; stroke: #c5ccd3 }
.frozen { fill: #e9eef3; stroke: #52606d; stroke-width: 1.3; stroke-dasharray: 5 3 }
.trained { fill: #ffe2b0; stroke: #8a2c0d; stroke-width: 2.6 }
.plain, .words { fill: #ffffff; stroke: #52606d; stroke-width: 1.2 }
.media { fill: url(#hatch); stroke: #52606d; stroke-width: 1.2 }
.answer { fill: #ffffff; stroke: #52606d; stroke-width: 1.2 }
.bar { fill: #1b1f24 }
.arrow { fill: none; stroke: #1b1f24; stroke-width: 1.4; marker-end: url(#tip) }
"""
DEFINITIONS = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" fill="#1b1f24"/></marker>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#ffffff"/><rect width="1.6" height="6" fill="#b9d7ea"/></pattern></defs>'
)


class Drawing:
    """Elements of an SVG, in the order in which they are drawn, with `{...}` filled in from `values`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.elements: list[str] = []

    def say(self, text: str) -> str:
        return text.format(**self.values)

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        attribute = f' class="{style}"' if style else ""
        self.elements.append(f'<text x="{x:g}" y="{y:g}"{attribute}>{escape(self.say(text), quote=False)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, radius: int = 5) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" class="{style}"/>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.elements.append(f'<path d="M{path}" class="arrow"/>')

    def words(self, part: Part, x: float, y: float) -> None:
        """Title and lines of a part around a point; the last says whether it trains."""
        lines = [(part.title, "title"), *((line, "") for line in part.lines)]
        if part.trains is None:
            lines.append((part.frozen, "frozen-word"))
        elif part.trains:
            lines.append((f"trains {part.trains}", "trains"))
        for index, (line, look) in enumerate(lines):
            self.text(x, y - 8 * len(lines) + 12 + 16 * index, line, look)

    def box(self, part: Part, x: float, y: float, width: float, height: float) -> None:
        """A part, with what it has inside."""
        self.rect(x, y, width, height, {None: "frozen", "": "plain"}.get(part.trains, "trained"))
        self.words(part, x + width / 2, y + (height - 25 * bool(part.chip)) / 2)
        if part.chip:
            self.rect(x + 8, y + height - 27, width - 16, 20, "trained", 4)
            self.text(x + width / 2, y + height - 13, part.chip, "trains")

    def svg(self, title: str, height: int) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img">\n<title>{escape(self.say(title))}</title>\n<style>{STYLE}</style>\n{DEFINITIONS}\n'
        )
        card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" class="card"/>'
        return head + "\n".join([card, *self.elements]) + "\n</svg>\n"


def draw(picture: Picture) -> str:
    """The SVG of a picture."""
    named = {alias: facts(recipe) for alias, recipe in picture.recipes.items()}
    drawing = Drawing({**named, **_derived(named["a"])})
    drawing.text(MARGIN, 27, picture.title, "head left")
    out = _draw_flow(drawing, picture.flow)
    _draw_decoder(drawing, picture)
    cells = _draw_strip(drawing, picture)
    middle, bottom = out
    if picture.into_cell is not None:
        target, top, turn = cells[picture.into_cell], STRIP_TOP, (bottom + STRIP_TOP) / 2 + 6
        drawing.arrow((middle, bottom), (middle, turn), (target, turn), (target, top))
        side = (middle + target) / 2
        drawing.text(side, turn - 6, picture.flow[-1].out, "shape")
    if picture.joins is not None:
        drawing.arrow((middle, bottom), (middle, DECODER_TOP + 12))
        drawing.text(middle - 8, STRIP_TOP + 22, picture.flow[-1].out + picture.joins, "shape right")
    _draw_legend(drawing, {cell.kind for cell in picture.cells})
    return drawing.svg(picture.title, HEIGHT)


def _derived(a: SimpleNamespace) -> dict[str, Any]:
    scales = getattr(a.options, "scales", None) or getattr(a.options, "vision_blocks", ())
    sums = {"prompted": ("prompts", "gates"), "second": ("norms", "bias_scale", "lora")}
    return {"scales": len(scales)} | {name: sum(a.parts.get(part, 0) for part in parts) for name, parts in sums.items()}


def _draw_flow(drawing: Drawing, parts: Sequence[Part]) -> tuple[float, float]:
    """The parts from left to right; returns where the last one is left, at its foot."""
    gap = (WIDTH - 2 * MARGIN - sum(part.width for part in parts)) / (len(parts) - 1)
    x, middle = float(MARGIN), FLOW_TOP + FLOW_HEIGHT / 2
    for index, part in enumerate(parts):
        drawing.box(part, x, FLOW_TOP, part.width, FLOW_HEIGHT)
        if index == len(parts) - 1:
            return x + part.width / 2, FLOW_TOP + FLOW_HEIGHT
        x += part.width
        drawing.arrow((x + 2, middle), (x + gap - 2, middle))
        above, _, below = part.out.partition("|")
        drawing.text(x + gap / 2, middle - 7, above, "shape")
        if below:
            drawing.text(x + gap / 2, middle + 17, below, "shape")
        x += gap
    raise AssertionError("a flow has parts")


def _draw_strip(drawing: Drawing, picture: Picture) -> list[float]:
    """The sequence, with arrows into the language model; returns the middle of each cell."""
    x, middles = float(MARGIN), []
    space = WIDTH - 2 * MARGIN - 4 * (len(picture.cells) - 1)
    scale = 1.0 if picture.joins is not None else space / sum(cell.width for cell in picture.cells)
    for index, cell in enumerate(picture.cells):
        width = cell.width * scale
        drawing.rect(x, STRIP_TOP, width, STRIP_HEIGHT, cell.kind, 3)
        drawing.text(x + width / 2, STRIP_TOP + 21, cell.text)
        if cell.kind == "answer":
            drawing.rect(x, STRIP_TOP + STRIP_HEIGHT - 4, width, 4, "bar", 0)
        middles.append(x + width / 2)
        below = DECODER_TOP + 12 if picture.routed and index == 0 else DECODER_TOP - 2
        drawing.arrow((x + width / 2, STRIP_TOP + STRIP_HEIGHT + 2), (x + width / 2, below))
        x += width + 4
    return middles


def _draw_decoder(drawing: Drawing, picture: Picture) -> None:
    """The language model with what is in it."""
    decoder, whole = picture.decoder, WIDTH - 2 * MARGIN
    used = sum(chip.width + 10 for chip in picture.chips)
    drawing.rect(MARGIN, DECODER_TOP, whole, DECODER_HEIGHT, "frozen" if decoder.trains is None else "trained")
    x, free = (MARGIN + 10, MARGIN + used) if picture.routed else (MARGIN + whole - used, MARGIN)
    drawing.words(decoder, free + (whole - used) / 2, DECODER_TOP + DECODER_HEIGHT / 2)
    for chip in picture.chips:
        drawing.box(chip, x, DECODER_TOP + 14, chip.width, DECODER_HEIGHT - 28)
        x += chip.width + 10


LEGEND = {
    "frozen": ("frozen", 90),
    "trained": ("trains, with its number of parameters", 260),
    "media": ("features as words", 150),
    "answer": ("learned: enters the loss", 150),
}


def _draw_legend(drawing: Drawing, kinds: set[str]) -> None:
    x, y = float(MARGIN), HEIGHT - 30
    for style in ("frozen", "trained", *(kind for kind in ("media", "answer") if kind in kinds)):
        text, width = LEGEND[style]
        drawing.rect(x, y, 26, 15, style, 3)
        if style == "answer":
            drawing.rect(x, y + 11, 26, 4, "bar", 0)
        drawing.text(x + 33, y + 12, text, "left")
        x += width


def written_files() -> Iterator[tuple[Path, str]]:
    """Every file with what is to stand in it."""
    for name, picture in DRAWN.items():
        yield PICTURES / f"system_{name}.svg", draw(picture)
    yield from filled_pages()


def main() -> None:
    """Writes what has changed."""
    for path, content in written_files():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
