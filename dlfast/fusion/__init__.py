"""Speeds up a model that is there already; see :func:`dlfast.fuse`."""

from dlfast.fusion.api import fuse, unfuse
from dlfast.fusion.run import NotFusedWarning
from dlfast.fusion.verify import verify

__all__ = ["NotFusedWarning", "fuse", "unfuse", "verify"]
