"""A folder with all that the documents' commands name: models, data sets, pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_ins import minigpt4_shapes, write_blip2, write_clip, write_eva, write_minigpt4

from mmfast.data.samples import content_parts
from mmfast.models import Llava
from mmfast.models.convert import to_original
from mmfast.train import load_recipe, train
from mmfast.world import samples, weights

# Names in the documents for which the language model and the encoder of the embedded world stand.
LANGUAGE_MODELS = [f"path/to/{name}" for name in ("vicuna-7b", "llama-7b", "llama-2-7b-chat", "llava-lightning-7b")]
ENCODERS = ["path/to/clip-vit-l-14-336"]
# Data sets in the documents, and the samples of the world that stand for them.
DATA = {
    "my.json": "questions-train",
    "instructions.json": "questions-train",
    "captions.json": "captions-train",
    "llava_v1_5_mix665k.json": "questions-train",
    "held-out.json": "questions-test",
}
PICTURES = ["cat.jpg", "dog.jpg"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which every page starts: models, data sets, pictures."""
    folder = tmp_path_factory.mktemp("documents") / "world"
    (folder / "images").mkdir(parents=True)
    for name, kind in [(name, "llm") for name in LANGUAGE_MODELS] + [(name, "encoder") for name in ENCODERS]:
        shutil.copytree(weights(kind), folder / name)
    _write_stand_ins(folder)
    for name, split in DATA.items():
        records = [_record(sample, folder / "images") for sample in samples(split)[:6]]
        (folder / name).write_text(json.dumps(records))
    (folder / "alpaca_data.json").write_text(
        json.dumps([{"instruction": f"Count to {n}.", "input": "", "output": "1 2 3"} for n in range(6)])
    )
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None, "subject": "maps"}
    problem |= {"lecture": "", "solution": ""}
    problems = {str(n): problem | {"split": "train" if n < 6 else "test"} for n in range(9)}
    (folder / "ScienceQA").mkdir()
    (folder / "ScienceQA" / "problems.json").write_text(json.dumps(problems))
    _write_videos(folder)
    picture = next((folder / "images").iterdir())
    for name in PICTURES:  # what a file is, its content tells
        shutil.copy(picture, folder / name)
    _write_pairs(folder)
    _write_shared(folder / "shared")
    (folder / "images" / "images").symlink_to(".")  # paths hold with --media_folder images and without
    to_original(Llava.from_parts("world", "world"), folder / "mm_projector.bin")
    return folder


def _write_stand_ins(folder: Path) -> None:
    """Random models and checkpoints where the world's are of another kind, and for images of the published size."""
    torch.manual_seed(0)
    write_clip(folder / "path/to/clip-vit-l-14", image_size=224, patch_size=56, num_layers=4)
    write_eva(folder / "path/to/blip2-flan-t5-xxl", image_size=224, patch_size=56)
    write_blip2(folder / "path/to/blip2_pretrained_flant5xxl.pth")
    write_minigpt4(folder / "checkpoint_4.pth", minigpt4_shapes(128))  # the width of the world's language model


def _write_pairs(folder: Path) -> None:
    """Captions as the two stages of MiniGPT-4 have them."""
    (folder / "pairs.json").write_text(json.dumps([{"image": name, "caption": "a pet"} for name in PICTURES] * 2))
    images = folder / "cc_sbu_align" / "image"
    images.mkdir(parents=True)
    annotations = [{"image_id": str(n), "caption": "a pet"} for n in range(4)]
    for annotation in annotations:
        shutil.copy(folder / PICTURES[0], images / f"{annotation['image_id']}.jpg")
    (images.parent / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))


def _write_shared(folder: Path) -> None:
    """What several machines see at the same place."""
    shutil.copytree(folder.parent / "images", folder / "images")
    shutil.copy(folder.parent / "llava_v1_5_mix665k.json", folder)
    for name in ("vicuna-7b", "clip-vit-l-14-336"):
        (folder / name).symlink_to(f"../path/to/{name}")


def _write_videos(folder: Path) -> None:
    (folder / "videos").mkdir()
    frames = [Image.new("L", (32, 32), 8 * index) for index in range(12)]
    frames[0].save(folder / "videos" / "v_1.gif", save_all=True, append_images=frames[1:])
    shutil.copy(folder / "videos" / "v_1.gif", folder / "clip.mp4")
    asked = [{"q": "What happens?", "a": "it grows", "video_id": "v_1"}] * 6
    (folder / "VideoInstruct_Dataset.json").write_text(json.dumps(asked))
    parts = [{"type": "video", "video": "videos/v_1.gif"}, {"type": "text", "text": "What happens?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "it grows"}]
    (folder / "held-out-videos.json").write_text(json.dumps([{"id": "1", "messages": messages}]))


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of `<recipe>`, or of one stage `<recipe>/<stage>`, of one step a stage; each is made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            recipe, _, only = name.partition("/")
            config = load_recipe(recipe)
            stages = [
                replace(stage, batch_size=4, micro_batch_size=None, max_steps=1)
                for stage in config.stages
                if only in ("", stage.name)
            ]
            out = tmp_path_factory.mktemp("run") / "run"
            train(replace(config, out=str(out), stages=stages))
            made[name] = out
        return made[name]

    return make


def _record(sample: Any, images: Path) -> dict[str, Any]:
    """A sample whose pictures are files."""
    messages = []
    for message in sample["messages"]:
        parts: list[dict[str, Any]] = [dict(part) for part in content_parts(message)]
        for part in parts:
            if part["type"] == "image":
                name = f"{sample['id'].replace('/', '-').replace(':', '-')}.png"
                part["image"].save(images / name)
                part["image"] = f"images/{name}"
        messages.append({"role": message["role"], "content": parts})
    return {"id": sample["id"], "messages": messages}


@pytest.fixture
def scratch(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the current one."""
    folder = tmp_path / "scratch"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder
