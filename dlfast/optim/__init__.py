"""Optimizers of ``torch.optim`` whose whole step is one native call.

Signatures, defaults, parameter groups, hooks, closures and state_dicts are those of ``torch.optim``:
a checkpoint of either library continues in the other with the same numbers to rounding.
"""

from dlfast.optim.adam import Adam, AdamW
from dlfast.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
