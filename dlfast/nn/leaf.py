"""What our layers are to a tracer."""

from __future__ import annotations

from torch import Tensor, fx, nn


def as_leaf(layer: nn.Module, input: Tensor) -> Tensor | None:
    """The call of `layer` as one node where ``torch.fx`` traces the module around it, as of a layer of PyTorch's.

    None where nobody traces, or where `layer` itself is what is traced.
    """
    if not isinstance(input, fx.Proxy):
        return None
    tracer = input.tracer
    if not isinstance(tracer, fx.Tracer) or tracer.root is layer:
        return None
    node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
    return node
