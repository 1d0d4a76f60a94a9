"""The pages of the systems: pictures and tables are what the script writes, and say what the papers say."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mmfast.train import recipe_names

ROOT = Path(__file__).resolve().parents[1]
PAGES, PICTURES = ROOT / "docs" / "systems", ROOT / "docs" / "pictures"

# Counts and shapes from the papers or from the sizes of the published checkpoints, as the pictures write them.
SAID = {
    "llava": ["20,979,712", "319,815,680", "576x1024", "576x4096"],
    "high_resolution": ["20,983,808", "7 views"],
    "minigpt4": ["3,149,824", "257x1408", "32x768", "32x4096"],
    "minigpt_v2": ["23,072,768", "33,554,432", "1025x1408", "256x5632"],
    "video_chatgpt": ["4,198,400", "(100+256)x4096"],
    "llama_adapter_v1": ["1,229,760", "in layers 3 to 32:"],
    "llama_adapter_v2": ["layers 2 to 32", "20x4096", "257x1024"],
    "llama_adapter_v2_multimodal": ["257x768", "10x4096, added", "41,340,928"],
    "lavin": ["491,760", "659,584", "2,621,760", "6x1024"],
}


@pytest.fixture(scope="module")
def written() -> dict[Path, str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from draw_systems import written_files

        return dict(written_files())
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_committed_files_are_what_the_script_writes(written: dict[Path, str]) -> None:
    stale = [path.name for path, content in written.items() if path.read_text(encoding="utf-8") != content]
    assert stale == [], "run python scripts/draw_systems.py"
    assert set(PICTURES.glob("system_*.svg")) | set(PAGES.glob("*.md")) == set(written)


@pytest.mark.parametrize("name", SAID)
def test_picture_says_the_published_numbers(name: str) -> None:
    root = ElementTree.parse(PICTURES / f"system_{name}.svg").getroot()
    drawn = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    texts = [text.replace("\u00d7", "x") for text in drawn]
    missing = [said for said in SAID[name] if not any(said in text for text in texts)]
    assert missing == [], texts
    assert {path.stem for path in PICTURES.glob("system_*.svg")} == {f"system_{said}" for said in SAID}


def test_every_picture_and_published_recipe_is_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES.glob("*.md") if path.name != "index.md")
    shown = re.findall(r"\]\(\.\./pictures/(system_\w+\.svg)\)", pages)
    assert sorted(shown) == sorted(path.name for path in PICTURES.glob("system_*.svg"))
    tabled = {name for names in re.findall(r"<!-- trains (.+?) -->", pages) for name in names.split()}
    assert tabled == {name for name in recipe_names() if not name.endswith("-world")}


def test_links_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
