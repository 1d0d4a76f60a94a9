"""Trainable bridges from an encoder's features to a language model's embeddings."""

from mmfast.connectors.projector import build_connector

__all__ = ["build_connector"]
