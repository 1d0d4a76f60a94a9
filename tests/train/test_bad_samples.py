"""The budget of bad samples: named, counted, replaced in one way only, and a stop when it is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmfast.data import EncodedDataset, JoinedDataset, JsonSamples
from mmfast.train import StageConfig, TrainConfig, train
from mmfast.train.setup import build_processor

MakeConfig = Callable[..., TrainConfig]
BROKEN = (3, 4, 11)
"""The next good ones are 5, 5 and 12."""


@pytest.fixture
def broken(data: str, tmp_path: Path) -> str:
    """The samples of `data`, of which three have a broken image, a lost one, and no turns."""
    records = json.loads(Path(data).read_text())
    for path in Path(data).parent.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    (tmp_path / "4.png").unlink()
    records[11]["messages"] = []
    (tmp_path / "broken.json").write_text(json.dumps(records))
    return str(tmp_path / "broken.json")


@pytest.fixture
def mended(data: str) -> str:
    """The samples of `data` with the next good ones in the places of the bad ones, written out by hand."""
    records = json.loads(Path(data).read_text())
    for index, other in zip(BROKEN, (5, 5, 12), strict=True):
        records[index]["messages"] = records[other]["messages"]
    path = Path(data).parent / "mended.json"
    path.write_text(json.dumps(records))
    return str(path)


def lines(out: str | Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in found]


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "model" / "trained.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_over_bad_samples_is_the_run_over_the_next_good_ones(
    make_config: MakeConfig, broken: str, mended: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"align": {"batch_size": 20, "max_steps": 2}, "lora": {"batch_size": 10, "max_steps": 2}}
    expected = train(make_config(**whole, data=mended, out=str(tmp_path / "mended")))
    for workers in (0, 2):
        out = str(tmp_path / f"broken-{workers}")
        result = train(make_config(**whole, data=broken, out=out, max_bad="15%", num_workers=workers))
        assert same(weights(result.out), weights(expected.out))
        assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(expected.out)]
        for stage in result.stages:
            assert len(stage.bad_samples) == 3
            for name in ("3.png", "4.png", "'sample-11': messages is []"):
                assert sum(name in error for error in stage.bad_samples) == 1
        assert result.bad_samples == [error for stage in result.stages for error in stage.bad_samples]
        assert [line["bad_samples"] for line in lines(out)][1::2] == [3, 3]
        printed = capsys.readouterr().out
        assert "train: a bad sample, the next takes its place (3 of 3): " in printed
    assert expected.bad_samples == [] and all(line["bad_samples"] == 0 for line in lines(expected.out))


@pytest.mark.parametrize("done", [2, 5])
def test_a_resumed_run_counts_on(
    make_config: MakeConfig,
    broken: str,
    tmp_path: Path,
    train_until_crash: Callable[[TrainConfig, int], None],
    done: int,
) -> None:
    whole = train(make_config(data=broken, out=str(tmp_path / "whole"), max_bad=3))
    assert whole.bad_samples
    config = make_config(data=broken, out=str(tmp_path / "killed"), max_bad=3, save_every=1)
    train_until_crash(config, done)
    result = train(config, resume=True)
    assert lines(result.out) == lines(whole.out)
    assert result.bad_samples == whole.bad_samples
    assert same(weights(result.out), weights(whole.out))
    states = sorted((Path(config.out) / "checkpoints").glob("*/state.json"))
    finished = json.loads(states[-1].read_text())["state"]["progress"]["finished"]
    assert [stage["bad_samples"] for stage in finished] == [stage.bad_samples for stage in whole.stages]


def test_a_spent_budget_stops_the_run_and_a_larger_one_continues_it(
    make_config: MakeConfig, broken: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"align": {"max_steps": 10, "batch_size": 2}, "data": broken, "save_every": 1}
    config = make_config(**options, max_bad=2)
    with pytest.raises(RuntimeError, match=r"train: 3 samples are bad, but max_bad allows for 2; .*data check") as info:
        train(config)
    assert all(name in str(info.value) for name in ("3.png", "4.png", "'sample-11': messages is []"))
    result = train(make_config(**options, max_bad=3), resume=True)
    whole = train(make_config(**options, max_bad=3, out=str(tmp_path / "whole")))
    assert lines(result.out) == lines(whole.out)
    assert same(weights(result.out), weights(whole.out))


def test_without_a_budget_the_first_bad_sample_stops_the_run(make_config: MakeConfig, broken: str) -> None:
    config = make_config(data=broken)
    with pytest.raises(ValueError, match=r"sample 'sample-11': messages is \[\]"):
        train(config)
    assert not Path(config.out).exists()


def test_the_next_good_sample_is_the_same_from_everywhere(backbones: dict[str, str], broken: str) -> None:
    processor = build_processor(TrainConfig(**backbones))
    samples = JsonSamples(broken, strict=False)
    dataset = JoinedDataset([EncodedDataset(samples, processor, samples.media_folder)], max_bad=3)
    for _ in range(2):
        for index, other in zip((3, 4, 11, 5), (5, 5, 12, 5), strict=True):
            assert dataset[index].id == f"sample-{other}"
            assert len(dataset[index].bad) == {3: 2, 4: 1, 11: 1, 5: 0}[index]


def test_a_data_set_of_bad_samples_alone_ends(backbones: dict[str, str], tmp_path: Path) -> None:
    processor = build_processor(TrainConfig(**backbones))
    content = [{"type": "image", "image": "lost.png"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    samples: Any = [{"id": f"s{index}", "messages": turns} for index in range(4)]
    for allowed in (1, 4, 100):
        dataset = JoinedDataset([EncodedDataset(samples, processor, tmp_path)], allowed)
        with pytest.raises(
            ValueError, match=rf"{min(4, allowed + 1)} samples are bad, but max_bad allows for {allowed}"
        ):
            dataset[2]


def test_media_of_the_wrong_kind_are_refused_before_there_is_a_run(
    make_config: MakeConfig, data: str, tmp_path: Path
) -> None:
    """Also those of the second stage, and of the second source."""
    turns = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, {"role": "assistant", "content": "x"}]
    (tmp_path / "film.json").write_text(json.dumps([{"id": "film", "messages": turns}]))
    film = str(tmp_path / "film.json")
    for fields in ({"data": film}, {"lora": {"data": film}}, {"lora": {"data": [data, film]}, "max_bad": "50%"}):
        config = make_config(**fields)
        with pytest.raises(ValueError, match=r"'film': it has a part of type 'video'; this model reads text and image"):
            train(config)
        assert not Path(config.out).exists()


def test_trying_the_data_leaves_the_stages_as_they_were(make_config: MakeConfig, tmp_path: Path) -> None:
    """A later stage's settings are no earlier stage's."""
    stages = make_config().stages
    wide = Image.new("RGB", (8, 2), "red")
    wide.save(tmp_path / "wide.png")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": "wide.png"}]},
        {"role": "assistant", "content": "red"},
    ]
    (tmp_path / "d.json").write_text(json.dumps([{"id": "a", "messages": turns}]))
    alone, both = (str(tmp_path / name) for name in ("alone", "both"))
    fields: dict[str, Any] = {"data": str(tmp_path / "d.json")}
    later = StageConfig("align", batch_size=1, max_steps=1, pad_to_square=True, media_first=True, template="plain")
    train(make_config(**fields, out=alone, stages=stages[:1]))
    train(make_config(**fields, out=both, stages=[stages[0], later]))
    assert [line["loss"] for line in lines(both)][:4] == [line["loss"] for line in lines(alone)]


@pytest.mark.parametrize(("max_bad", "cache"), [("1.5", None), (-1, None), ("200%", None), (1, "cache")])
def test_refused_budgets(make_config: MakeConfig, max_bad: Any, cache: str | None) -> None:
    with pytest.raises(ValueError, match=r"max_bad is .* accepted"):
        make_config(max_bad=max_bad, feature_cache=cache)
