"""Speeds up a model that is there already; see :func:`dlfast.fuse`."""

from dlfast.fusion.api import NotFusedWarning, fuse, unfuse
from dlfast.fusion.verify import verify

__all__ = ["NotFusedWarning", "fuse", "unfuse", "verify"]
