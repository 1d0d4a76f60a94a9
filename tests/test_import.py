"""The package imports cheaply, everywhere, and shadows nobody."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "triton", "accelerate", "sklearn", "PIL", "scipy", "pandas", "jsonargparse", "torchvision")


def python(code: str, cwd: Path, executable: str = sys.executable, **environment: str) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
    run = subprocess.run([executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without CUDA (which adds minutes and no file) and without optimising."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    # From a copy: a build in the checkout would race with the editable extension.
    source = folder / "source"
    tracked = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(["git", *tracked], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command += ["-C", "cmake.build-type=Debug", "-C", "cmake.define.MMFAST_CUDA=OFF", "-w", str(folder), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(folder.glob("mmfast-*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what installing the wheel would put into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_import_brings_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, mmfast, mmfast.ops; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(eval(python(code, tmp_path)))
    # torch itself may import some of these; only what we add counts.
    base = set(eval(python("import sys, torch; print(sorted({m.split('.')[0] for m in sys.modules}))", tmp_path)))
    assert not (loaded - base) & set(HEAVY)
    assert loaded - base <= {"mmfast", "_mmfast"} | {m for m in loaded if m in sys.stdlib_module_names}


def test_optimize_brings_neither_transformers_nor_peft(tmp_path: Path) -> None:
    code = "import sys, mmfast; mmfast.optimize; print([m for m in ('transformers', 'peft') if m in sys.modules])"
    assert python(code, tmp_path) == "[]"


def test_ops_work_without_the_extension_triton_and_transformers(tmp_path: Path) -> None:
    code = """
import sys
for name in ("mmfast._C", "triton", "transformers"):
    sys.modules[name] = None
import torch, mmfast
x = torch.ones(1, 2, 3, 4)
print(mmfast.ops.spatio_temporal_pool(x).shape)
print(mmfast.ops.explain(mmfast.ops.spatio_temporal_pool, x))
"""
    printed = python(code, tmp_path)
    assert "torch.Size([1, 5, 4])" in printed
    assert "runs on: reference" in printed
    assert "mmfast._C cannot be imported" in printed


def test_editable_install_reads_the_checkout_from_any_folder(tmp_path: Path) -> None:
    code = """
import importlib.util, mmfast.kernels.spatio_temporal_pool as kernel
spec = importlib.util.find_spec("kernels")
print(kernel.__file__, "|", spec and (spec.origin or list(spec.submodule_search_locations)))
"""
    where, shadow = python(code, tmp_path).split(" | ")
    if where.startswith(str(ROOT)):  # an editable install, not a wheel under test
        assert where == str(ROOT / "kernels" / "spatio_temporal_pool.py")
    assert str(ROOT) not in shadow, "the checkout's folder kernels/ must not be importable as `kernels`"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_members(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("mmfast/", "mmfast-")) for name in names), names
    assert any(name.startswith("mmfast/_C.") for name in names)
    wanted = {
        "mmfast/py.typed",
        "mmfast/kernels/spatio_temporal_pool.py",
        "mmfast/benchmarks/harness.py",
        "mmfast/benchmarks/crossover.py",
        "mmfast/ops/crossover_tables/cpu.json",
        "mmfast/recipes/llava-world.yaml",
    }
    wanted |= {f"mmfast/world/weights/{part}/model.safetensors" for part in ("encoder", "llm")}
    assert wanted <= set(names)
    sources = {f"mmfast/{path.relative_to(ROOT / 'mmfast').as_posix()}" for path in (ROOT / "mmfast").rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.parametrize("beside", ["alone", "beside the PyPI package"])
def test_wheel_works_with_transformers(site: Path, tmp_path: Path, beside: str) -> None:
    if beside != "alone":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.17.2'\nMARK = 'theirs'\n")
    code = f"""
import sys
sys.path[:0] = [{str(site)!r}, {str(tmp_path)!r}]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
import torch, mmfast, mmfast.kernels.spatio_temporal_pool
assert mmfast.__file__.startswith({str(site)!r}), mmfast.__file__
assert mmfast.kernels.spatio_temporal_pool.__file__.startswith({str(site)!r})
x = torch.randn(2, 16, 64, 64)
print(mmfast.ops.spatio_temporal_pool(x, backend="cpu").shape)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
is_kernels_available()
if {beside != "alone"}:
    import kernels
    assert kernels.MARK == "theirs"
model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, vocab_size=20))
print(model(torch.tensor([[1, 2]])).logits.shape)
"""
    assert python(code, tmp_path).split("\n") == ["torch.Size([2, 80, 64])", "torch.Size([1, 2, 20])"]


def test_transformers_imports_from_the_checkout_root() -> None:
    # `kernels/` is a namespace package here; transformers must see that it is not the PyPI package.
    code = "import sys; sys.path.insert(0, ''); from transformers import LlamaForCausalLM; print('ok')"
    assert python(code, ROOT) == "ok"


def test_version_is_written_once() -> None:
    import tomllib

    import mmfast

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == mmfast.__version__
    assert importlib.util.find_spec("mmfast") is not None
