"""Optimizers of ``torch.optim`` and others, whose whole step is one native call.

Signatures, defaults, parameter groups, hooks, closures and state_dicts are those of ``torch.optim``:
a checkpoint of either library continues in the other with the same numbers to rounding. What a training
step does beside the update (clipping, unscaling, averaging, clearing gradients, states in fewer bits) is
asked for by the keyword arguments of :class:`Extras`, and done in the same pass over memory.
"""

from dlfast.optim._options import Extras
from dlfast.optim._release import step_in_backward
from dlfast.optim.adagrad import Adagrad
from dlfast.optim.adam import Adam, AdamW
from dlfast.optim.lamb import LAMB
from dlfast.optim.lion import Lion
from dlfast.optim.rmsprop import RMSprop
from dlfast.optim.sgd import SGD

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Extras", "Lion", "RMSprop", "step_in_backward"]
