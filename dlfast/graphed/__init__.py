"""Whole training steps in a CUDA graph; see :func:`dlfast.graphed_step`."""

from dlfast.graphed.api import GraphedStep, NotGraphedWarning, graphed_step

__all__ = ["GraphedStep", "NotGraphedWarning", "graphed_step"]
