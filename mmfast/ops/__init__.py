"""Ops: one definition each in plain PyTorch, the same on every backend, forward and backward."""

from mmfast.ops.backends import BackendUnavailable, explain, use_backend
from mmfast.ops.linear_cross_entropy import linear_cross_entropy
from mmfast.ops.spatio_temporal_pool import spatio_temporal_pool

__all__ = ["BackendUnavailable", "explain", "linear_cross_entropy", "spatio_temporal_pool", "use_backend"]
