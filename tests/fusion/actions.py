"""What people do to models, for sequences that a plain model and a fused one go through side by side."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dlfast
from dlfast.fusion.api import is_fused

IMAGES = (2, 3, 8, 8)


# ---- Models ------------------------------------------------------------------------------------------------


def conv_pool() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None),
    )  # fmt: skip


def rising() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout2d(0.3),
        nn.MaxPool2d(3),
    )  # fmt: skip


def norm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.AvgPool2d(2))


def relu_pool() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.ReLU(), nn.MaxPool2d(2))


def across() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(block, nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.MaxPool2d(3))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.pools = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), 2.0, True

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2) * self.scale
        x = torch.relu(self.b(x))
        return F.max_pool2d(x, 3) if self.pools else x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu, self.pool, self.extra = nn.ReLU(inplace=True), nn.MaxPool2d(2), None

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + x
        if self.extra is not None:
            out = self.extra(out)
        return self.pool(self.relu(out))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        for _ in range(2):
            x = self.pool(self.relu(self.conv(x)))
        return x


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in (0, 1)])
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.pool(x)


class Walked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        for layer in self.features:
            x = layer(x)
        return x


class Branching(nn.Module):
    """A forward that no trace follows, around a child that fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x):
        return self.block(x) if x.sum() > -1e9 else x


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.conv, self.pool = self.first[0], nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.first(self.pool(F.relu(self.conv(x)))))


MODELS: list[Callable[[], nn.Module]] = [
    conv_pool, normalised, rising, norm_first, relu_pool, across, Functional, Residual, Repeated, Listed, Walked,
    Branching, Aliased,
]  # fmt: skip


# ---- Actions: the same to a plain and to a fused model ------------------------------------------------------


def layer(model: nn.Module, index: int, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module) -> Any:
    """One of the layers without children, or None."""
    found = [m for m in model.modules() if isinstance(m, kind) and (kind is not nn.Module or not list(m.children()))]
    return found[index % len(found)] if found else None


def parent_of(model: nn.Module, index: int) -> tuple[nn.Module, str]:
    places = [(m, name) for m in model.modules() for name, child in m._modules.items() if child is not None]
    return places[index % len(places)]


def double(module: nn.Module, args: Any, output: Any = None) -> Any:
    return (args[0] * 2, *args[1:]) if output is None else output * 2


def double_gradient(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else g * 2 for g in grad_input)


def hook(model: nn.Module, index: int) -> None:
    target = list(model.modules())[index % len(list(model.modules()))]
    kind = ("forward", "forward_pre", "full_backward", "forward")[index % 4]
    getattr(target, f"register_{kind}_hook")(double_gradient if kind == "full_backward" else double)


def unhook(model: nn.Module, index: int) -> None:
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            for kind in ("_forward_hooks", "_backward_hooks"):
                getattr(module, kind).clear()


def replace(model: nn.Module, index: int) -> None:
    parent, name = parent_of(model, index)
    old = parent._modules[name]
    torch.manual_seed(index)
    new: nn.Module = nn.Identity()
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, old.out_channels, 1).to(old.weight.dtype)
    elif isinstance(old, nn.BatchNorm2d):
        new = nn.BatchNorm2d(old.num_features, affine=index % 2 == 0).to(next(model.parameters()).dtype)
    elif isinstance(old, nn.ReLU):
        new = (nn.GELU, nn.LeakyReLU, nn.ReLU)[index % 3]()
    elif isinstance(old, nn.MaxPool2d):
        new = (nn.AvgPool2d(2), nn.MaxPool2d(2, 1), nn.AdaptiveMaxPool2d(1))[index % 3]
    setattr(parent, name, new.train(parent.training))


ATTRIBUTES: list[tuple[type[nn.Module], str, Any]] = [
    (nn.Conv2d, "stride", (2, 2)), (nn.Conv2d, "padding", (2, 2)), (nn.Conv2d, "padding_mode", "circular"),
    (nn.Conv2d, "bias", None), (nn.BatchNorm2d, "eps", 0.1), (nn.BatchNorm2d, "momentum", 0.5),
    (nn.BatchNorm2d, "track_running_stats", False), (nn.BatchNorm2d, "running_mean", None),
    (nn.BatchNorm2d, "weight", None),
    (nn.MaxPool2d, "stride", 1), (nn.MaxPool2d, "ceil_mode", True), (nn.MaxPool2d, "padding", 1),
    (nn.LeakyReLU, "negative_slope", -0.5), (nn.Dropout2d, "p", 0.9), (nn.ReLU, "inplace", True),
    (Functional, "scale", 0.5), (Functional, "pools", False), (Residual, "extra", nn.Tanh()), (nn.Module, "tag", 1),
]  # fmt: skip


def set_attribute(model: nn.Module, index: int) -> None:
    kind, name, value = ATTRIBUTES[index % len(ATTRIBUTES)]
    target = layer(model, index // len(ATTRIBUTES), kind)
    if target is not None:
        if name == "running_mean":
            target.running_mean = target.running_var = None
        else:
            setattr(target, name, copy.deepcopy(value))


def override(model: nn.Module, index: int) -> None:
    target = layer(model, index)
    if isinstance(target, nn.Conv2d) and index % 2:
        target._conv_forward = Overridden(target)
    else:
        target.forward = Twice(type(target), target)


class Overridden:
    """A method put on an instance, that can be copied and pickled."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padded = F.pad(input, [p for p in reversed(self.conv.padding) for _ in (0, 1)], mode="constant", value=1.0)
        return F.conv2d(padded, weight, bias, self.conv.stride)


class Twice:
    def __init__(self, kind: type[nn.Module], target: nn.Module) -> None:
        self.kind, self.target = kind, target

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return self.kind.forward(self.target, input) * 2


def pruned(model: nn.Module, index: int) -> None:
    target = layer(model, index, nn.Conv2d)
    if target is not None and "weight" in target._parameters:
        prune.l1_unstructured(target, "weight", 0.5)


def unpruned(model: nn.Module, index: int) -> None:
    for module in model.modules():
        if "weight_orig" in module._parameters:
            prune.remove(module, "weight")


def parametrised(model: nn.Module, index: int) -> None:
    target = layer(model, index, nn.Conv2d)
    if target is not None and "weight" in target._parameters and not parametrize.is_parametrized(target):
        parametrizations.weight_norm(target)


def unparametrised(model: nn.Module, index: int) -> None:
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def grown(model: nn.Module, index: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            module.insert(index % (len(module) + 1), nn.Tanh()) if index % 2 else module.append(nn.Sigmoid())
            return
        if isinstance(module, nn.ModuleList):
            module.append(nn.ReLU())
            return


def shrunk(model: nn.Module, index: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 2:
            del module[index % len(module)]
            return


@torch.no_grad()
def written(model: nn.Module, index: int) -> None:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if tensors:
        tensors[index % len(tensors)].mul_(1.5).add_(0.1)


def written_through_data(model: nn.Module, index: int) -> None:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.numel()]
    if tensors:
        target = tensors[index % len(tensors)]
        target.data.view(-1)[index % target.numel()] += 1.0
    model.train(model.training) if index % 2 else model.eval()


def reassigned(model: nn.Module, index: int) -> None:
    target = layer(model, index, (nn.Conv2d, nn.BatchNorm2d))
    if target is not None and "weight" in target._parameters and target.weight is not None:
        target.weight = nn.Parameter(target.weight.detach() * 0.5)
        target.weight.data = target.weight.data.clone()


def loaded(model: nn.Module, index: int) -> None:
    state = {k: v * 0.9 if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=index % 2 == 0)


def frozen(model: nn.Module, index: int) -> None:
    for number, p in enumerate(model.parameters()):
        if p.is_leaf:
            p.requires_grad_((number + index) % 3 > 0)


def moded(model: nn.Module, index: int) -> None:
    modules = list(model.modules())
    modules[index % len(modules)].train(index % 2 == 0)


def stepped(model: nn.Module, index: int) -> None:
    # Clipped: in a model that runs away, each step makes a multiple of every rounding.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def cast(model: nn.Module, index: int) -> None:
    model.to((torch.float32, torch.float64, torch.float64)[index % 3])


def laid_out(model: nn.Module, index: int) -> None:
    model.to(memory_format=(torch.channels_last, torch.contiguous_format)[index % 2])


def renewed(model: nn.Module, index: int) -> None:
    for module in model.modules():
        name = type(module).__name__
        if "Conv2d" in name:
            # No two alike: which of equal weights pruning takes, after a step, roundings would decide.
            with torch.no_grad():
                module.weight.copy_(torch.linspace(0.1, 0.4, module.weight.numel()).view_as(module.weight))
        elif name.startswith("Dropout"):
            module.train()
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.reset_running_stats()


ACTIONS: list[Callable[[nn.Module, int], None]] = [
    hook, unhook, replace, set_attribute, override, pruned, unpruned, parametrised, unparametrised, grown, shrunk,
    written, written_through_data, reassigned, loaded, frozen, moded, stepped, cast, laid_out, renewed,
]  # fmt: skip


# ---- Actions that give another model ------------------------------------------------------------------------


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fused_again(model: nn.Module) -> nn.Module:
    """The fused side taken back and fused again; nothing of a plain model."""
    return dlfast.fuse(dlfast.unfuse(model)) if is_fused(model) else model


COPIES: list[Callable[[nn.Module], nn.Module]] = [copied, pickled, saved, fused_again]


# ---- Ways to run --------------------------------------------------------------------------------------------


def called(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def called_without_gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def called_in_inference_mode(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x.detach()).clone()


def called_functionally(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    changed = {name: p * 1.25 for name, p in model.named_parameters()}
    return torch.func.functional_call(model, changed, (x,))


def called_one_by_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(model, nn.Sequential):
        return model(x)
    for each in model:
        x = each(x)
    return x


def called_as_a_graph(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Branching):
        return model(x)
    return torch.fx.symbolic_trace(model)(x)


def called_under_global_hooks(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.ReLU) else None
    )
    try:
        return model(x)
    finally:
        handle.remove()


def called_without_a_batch(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x[0])


WAYS: list[Callable[[nn.Module, torch.Tensor], torch.Tensor]] = [
    called, called_without_gradients, called_in_inference_mode, called_functionally, called_one_by_one,
    called_as_a_graph, called_under_global_hooks, called_without_a_batch,
]  # fmt: skip
