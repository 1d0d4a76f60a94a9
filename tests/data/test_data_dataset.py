from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mmfast.data import EncodedDataset, Processor, check_supervision


def sample(id: str, question: str = "What?", image: str | None = None) -> Any:
    content: list[Any] = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    return {"id": id, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}


def test_dataset_encodes_when_indexed(make_processor: Callable[..., Processor], media: Path) -> None:
    samples = [sample("a"), sample("b", image="red.png"), sample("c", image="broken.png")]
    dataset = EncodedDataset(samples, make_processor(), media)
    assert len(dataset) == 3
    assert dataset[0].media == []
    assert dataset[1].id == "b"
    assert dataset[1].media[0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"sample 'c': cannot read image .*broken.png"):
        dataset[2]


def test_dataset_is_the_same_through_data_workers(make_processor: Callable[..., Processor], media: Path) -> None:
    processor = make_processor()
    dataset = EncodedDataset([sample(str(i), "What? " * i, "red.png") for i in range(4)], processor, media)
    plan = [[2, 0], [3, 1]]
    loader = DataLoader(dataset, batch_sampler=plan, num_workers=1, collate_fn=processor.collate)
    for batch, indices in zip(loader, plan, strict=True):
        expected = processor.collate([dataset[index] for index in indices])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_dataset_refuses_an_unsupervised_sample_by_name(make_processor: Callable[..., Processor]) -> None:
    dataset = EncodedDataset([sample("short"), sample("long", "What? " * 50)], make_processor(max_length=40))
    assert dataset[0].supervised_tokens > 0
    with pytest.raises(ValueError, match=r"sample 'long' has no supervised token within max_length=40"):
        dataset[1]


def test_check_supervision_counts(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor()
    samples = [sample("a"), sample("b", "What is it?", "missing.png")]  # no file is opened
    report = check_supervision(EncodedDataset(samples, processor))
    encoded = [processor.encode(item, load_media=False) for item in samples]
    assert report.samples == 2
    assert report.tokens == sum(len(item.input_ids) for item in encoded)
    assert report.longest == max(len(item.input_ids) for item in encoded)
    assert report.supervised_tokens == sum(item.supervised_tokens for item in encoded)


def test_check_supervision_names_the_first_samples(make_processor: Callable[..., Processor]) -> None:
    samples = [sample(f"s{index}", "What? " * (50 if index % 2 else 1)) for index in range(30)]
    dataset = EncodedDataset(samples, make_processor(max_length=40))
    names = ", ".join(f"'s{index}'" for index in range(1, 20, 2))
    with pytest.raises(ValueError, match=rf"15 of 30 samples \({names}, …\): each has no supervised token"):
        check_supervision(dataset)
    assert check_supervision(dataset, limit=1).samples == 1


def test_check_supervision_reads_no_more_than_the_limit(make_processor: Callable[..., Processor]) -> None:
    made: list[int] = []

    class Lazy(Sequence[Any]):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: Any) -> Any:
            made.append(index)
            return sample(str(index))

    assert check_supervision(EncodedDataset(Lazy(), make_processor()), limit=5).samples == 5
    assert made == [0, 1, 2, 3, 4]


def test_check_supervision_refuses_an_empty_data_set(make_processor: Callable[..., Processor]) -> None:
    with pytest.raises(ValueError, match=r"0 samples, limit is None; expected at least one"):
        check_supervision(EncodedDataset([], make_processor()))
