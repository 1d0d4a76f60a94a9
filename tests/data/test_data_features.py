"""The cache of features: written whole, checked when read, made again when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmfast.data.features import FeatureCache

FEATURES = torch.randn(9, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cache_keeps_tensors_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = FeatureCache(tmp_path / "cache", "r1")
    assert cache.get("a") is None
    assert not (tmp_path / "cache").exists()
    cache.put("a", FEATURES.to(dtype).T)
    found = FeatureCache(tmp_path / "cache", "r1").get("a")
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, FEATURES.to(dtype).T)
    (file,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert file == cache.path("a")


def test_cache_knows_revision_and_key(tmp_path: Path) -> None:
    FeatureCache(tmp_path, "r1").put("a", FEATURES)
    assert FeatureCache(tmp_path, "r2").get("a") is None
    assert FeatureCache(tmp_path, "r1").get("b") is None


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_cache_removes_damaged_files(tmp_path: Path, damage: str) -> None:
    cache = FeatureCache(tmp_path, "r1")
    cache.put("a", FEATURES)
    path = cache.path("a")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-5])
    elif damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"other": FEATURES}, path)
    with pytest.warns(UserWarning, match=r"feature cache: .* is damaged .*made again"):
        assert cache.get("a") is None
    assert not path.exists()
    cache.put("a", FEATURES)
    assert torch.equal(load_file(path)["features"], FEATURES)
