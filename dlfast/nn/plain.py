"""What makes a layer of PyTorch's that and nothing else."""

from __future__ import annotations

from torch import nn

# What somebody else would see, or change, if the layer did not run.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whoever replaces one of these on the class wants it to run.
_METHODS = ("forward", "_conv_forward")


def _methods(kind: type[nn.Module]) -> list[object]:
    return [getattr(kind, name, None) for name in _METHODS]


_AS_INSTALLED: dict[type[nn.Module], list[object]] = {
    kind: _methods(kind)
    for kind in (
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
        nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Dropout2d, nn.Identity,
    )
}  # fmt: skip


def is_as_installed(kind: type[nn.Module]) -> bool:
    """Whether nobody has replaced a method of a class of PyTorch's.

    >>> is_as_installed(nn.Conv2d)
    True
    """
    installed = _AS_INSTALLED[kind]
    return kind.forward is installed[0] and (installed[1] is None or vars(kind).get("_conv_forward") is installed[1])


def oddity(layer: nn.Module) -> str:
    """Why `layer` is not, or not only, a layer of its class; empty where it is.

    >>> oddity(nn.ReLU())
    ''
    >>> relu = nn.ReLU()
    >>> handle = relu.register_forward_hook(print)
    >>> oddity(relu)
    'it has forward_hooks'
    """
    own = layer.__dict__
    for name in HOOKS:
        if own[name]:
            return f"it has {name.strip('_')}"
    kind = type(layer)
    replaced = [name for name in own if hasattr(kind, name)]
    if replaced:
        return f"its {replaced[0]} was replaced"
    if own["_modules"]:
        return f"it has children ({', '.join(own['_modules'])})"
    if kind in _AS_INSTALLED and not is_as_installed(kind):
        return f"a method of {kind.__name__} was replaced"
    return ""
