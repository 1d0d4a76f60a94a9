"""The documents build as a site in which every link and anchor leads somewhere, and nothing is fetched."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from documents import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config

MODULES = ("ops", "nn", "adapt", "models", "data", "train", "evaluate", "generate")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_pages_fetch_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)[^>]* src=["']?(?:https?:)?//|<link[^>]* href=["']?https?://"""
    )
    assert [page.name for page in pages if fetched.search(page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("module", MODULES)
def test_api_pages_have_every_public_name(site: Path, module: str) -> None:
    text = (site / "api" / f"{module}.html").read_text(encoding="utf-8")
    if module == "adapt":
        text += (site / "api" / "index.html").read_text(encoding="utf-8")  # `optimize`
    # A function that shares its name with its file is shown by its full path.
    shown = set(re.findall(rf'<h2 id="mmfast\.{module}\.(?:\w+\.)?(\w+)"', text))
    assert set(importlib.import_module(f"mmfast.{module}").__all__) - shown == set()
