import pytest
import torch

from mmfast.nn import SpatioTemporalPool
from mmfast.ops import spatio_temporal_pool


def test_is_the_op_with_a_fixed_number_of_rows() -> None:
    features = torch.randn(2, 3, 4, 8)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    pooled = SpatioTemporalPool(5)(features, mask)
    assert pooled.shape == (2, 5 + 4, 8)
    assert torch.equal(pooled, spatio_temporal_pool(features, 5, mask))
    assert torch.equal(pooled[1, 0], features[1, 0].mean(0))
    assert pooled[:, 3:5].count_nonzero() == 0


def test_as_many_rows_as_frames() -> None:
    assert SpatioTemporalPool()(torch.randn(1, 3, 4, 8)).shape == (1, 3 + 4, 8)


def test_has_nothing_to_save_and_says_its_setting() -> None:
    pool = SpatioTemporalPool(100)
    assert not pool.state_dict()
    assert str(pool) == "SpatioTemporalPool(num_temporal_tokens=100)"


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_temporal_tokens is 0; expected at least 1"):
        SpatioTemporalPool(0)
    with pytest.raises(ValueError, match="num_temporal_tokens is 2 but features has 3 frames"):
        SpatioTemporalPool(2)(torch.randn(1, 3, 4, 8))
