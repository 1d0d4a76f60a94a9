"""Ops: one definition each in plain PyTorch, the same on every backend, forward and backward."""

from mmfast.ops.backends import BackendUnavailable, explain, use_backend

__all__ = ["BackendUnavailable", "explain", "use_backend"]
