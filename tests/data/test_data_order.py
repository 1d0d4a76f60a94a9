from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data import BatchPlan, epoch_order


def test_epoch_order_is_a_permutation_of_seed_and_epoch_only() -> None:
    first = epoch_order(1000, seed=3, epoch=5)
    assert sorted(first.tolist()) == list(range(1000))
    assert first.equal(epoch_order(1000, seed=3, epoch=5))
    others = [epoch_order(1000, seed, epoch) for seed, epoch in ((3, 6), (4, 5), (5, 3), (2, 6))]
    assert not any(first.equal(other) for other in others)


def test_epoch_order_leaves_the_global_generator_alone() -> None:
    import torch

    before = torch.get_rng_state()
    epoch_order(10, 0, 0)
    assert before.equal(torch.get_rng_state())


def test_epoch_order_stays_as_it_is() -> None:
    """A run must continue after an update of this package with the order it began with."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [5, 0, 7, 2, 6, 4, 3, 1]


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    start=st.integers(0, 60),
    drop_last=st.booleans(),
)
def test_batch_plan_jumps_to_any_step(num_samples: int, batch_size: int, start: int, drop_last: bool) -> None:
    drop_last = drop_last and num_samples >= batch_size
    plan = BatchPlan(num_samples, batch_size, seed=7, drop_last=drop_last)
    replayed = list(plan.batches(0, start + 5))
    assert len(replayed) == start + 5
    assert list(plan.batches(start, start + 5)) == replayed[start:]
    assert plan.batch(start) == replayed[start]
    epoch, position = plan.locate(start)
    assert epoch * plan.batches_per_epoch + position == start


@settings(max_examples=40, deadline=None)
@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 12), epoch=st.integers(0, 3))
def test_batch_plan_sees_every_sample_once_per_epoch(num_samples: int, batch_size: int, epoch: int) -> None:
    plan = BatchPlan(num_samples, batch_size, seed=1)
    first = epoch * plan.batches_per_epoch
    batches = list(plan.batches(first, first + plan.batches_per_epoch))
    assert [index for batch in batches for index in batch] == epoch_order(num_samples, 1, epoch).tolist()
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_batch_plan_drops_the_last_batch() -> None:
    plan = BatchPlan(10, 4, seed=0, drop_last=True)
    assert plan.batches_per_epoch == 2
    assert [len(batch) for batch in plan.batches(0, 6)] == [4] * 6
    assert BatchPlan(8, 4, seed=0, drop_last=True).batches_per_epoch == 2


def test_batch_plan_refuses() -> None:
    with pytest.raises(ValueError, match=r"num_samples is 0 and batch_size is 4"):
        BatchPlan(0, 4, seed=0)
    with pytest.raises(ValueError, match=r"3 samples fill no batch of 4"):
        BatchPlan(3, 4, seed=0, drop_last=True)
    with pytest.raises(ValueError, match=r"step is -1"):
        BatchPlan(3, 4, seed=0).locate(-1)
    with pytest.raises(ValueError, match=r"num_samples is -1"):
        epoch_order(-1, 0, 0)
