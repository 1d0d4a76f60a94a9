"""Frozen encoders behind one interface: pixels [n, 3, H, W] in, features [n, P, D] out."""

from mmfast.encoders.clip import ClipEncoder

__all__ = ["ClipEncoder"]
