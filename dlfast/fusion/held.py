"""Layers that somebody outside of a model holds as well."""

from __future__ import annotations

import gc
import sys
from collections import Counter

from torch import nn

from dlfast.fusion.exposure import in_containers


def held_elsewhere(model: nn.Module) -> set[int]:
    """The ids of the layers of `model` with more references than the model itself has to them.

    They may be anybody's: another model's that was given the same ``act=nn.ReLU()``, or a variable's.
    """
    found = _surplus(model)
    if found:  # it may be rubbish that holds them
        gc.collect()
        found = _surplus(model)
    return found


def _surplus(model: nn.Module) -> set[int]:
    inside = _inside(model)
    (of_counting,) = _references(nn.Sequential(nn.Identity())).values()
    return {key for key, count in _references(model).items() if count - (of_counting - 1) > inside[key]}


def _inside(model: nn.Module) -> Counter[int]:
    """The references that the modules of `model` have to each other. (Apart: local variables are references too.)"""
    found: Counter[int] = Counter()
    for module in model.modules():
        attributes = [value for name, value in vars(module).items() if name != "_modules"]
        found.update(id(child) for child in module._modules.values() if child is not None)
        found.update(id(each) for each in in_containers(attributes))
    return found


def _references(model: nn.Module) -> dict[int, int]:
    """The references to each layer in `model`, with those that counting takes."""
    modules = list(model.modules())
    return {
        id(child): sys.getrefcount(child)
        for module in modules
        for child in module._modules.values()
        if child is not None
    }
