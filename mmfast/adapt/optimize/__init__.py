"""Give the layers of a Hugging Face model the forwards of mmfast's ops: per instance, in place and reversibly."""

from mmfast.adapt.optimize.classes import restore
from mmfast.adapt.optimize.report import Left, OptimizeReport, Replaced
from mmfast.adapt.optimize.walk import OPS, optimize

__all__ = ["OPS", "Left", "OptimizeReport", "Replaced", "optimize", "restore"]
