"""What a step is made of: which tensors take part, their states, their checks, and who computes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Parameter

from dlfast._native import native, runs_on
from dlfast.optim import _formats
from dlfast.optim._checkpoint import MASTERS, Checkpoint
from dlfast.optim._members import HALVES, Member, compute_dtype, is_dtensor, local_of, sharded_over
from dlfast.optim._options import FLAGS, PLAIN, check_engine, check_set, overlaps_itself

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Other subclasses of Tensor have an arithmetic of their own, which plain PyTorch respects.
PLAIN_TYPES = (Parameter, Tensor)


def native_devices() -> tuple[str, ...]:
    """Where the step has native code; elsewhere it is plain PyTorch."""
    if native.module is None:
        return ()
    return ("cpu", "cuda") if native.build.get("cuda") else ("cpu",)


@dataclass
class Made:
    """An entry of `state` that a step has added to, for the case that it is skipped."""

    key: Tensor
    entry: dict[str, Any]
    before: frozenset[str] | None  # what was in it; None: there was no entry

    def undo(self, state: Any) -> None:
        """As if what is new had never been."""
        for name in self.added():
            del self.entry[name]
        if self.before is None:
            state.pop(self.key, None)

    def added(self) -> set[str]:
        return self.entry.keys() - (self.before or ())


@dataclass
class Bucket:
    """What one native step covers: members of one device (on CUDA also of one dtype), split over the same mesh."""

    native_step: Any
    members: list[Member]
    device: torch.device
    mesh: Any
    mesh_dims: tuple[int, ...]

    def grads(self) -> list[Tensor] | None:
        """Of this process's parts, where they are not those of the parameters; fewer than members where one has
        none, or is another tensor by now."""
        if self.mesh is None:
            return None
        grads = [m.key.grad for m in self.members if local_of(m.key) is m.param]
        return [local_of(g) for g in grads if g is not None]


def refuse_under_capture(what: str) -> None:
    """What is made while a CUDA graph is captured would be made anew at every replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured, but the optimizer has not made its {what} yet: take a step, with "
            "gradients for all parameters, before the capture"
        )


class Prepared:
    """How the step of one set of parameters is taken, as long as the groups are the same and ask for the same."""

    def __init__(self, asked: list[Any], lists: list[list[Tensor]]) -> None:
        self.asked = asked
        self.lists = lists  # of parameters, one a group: kept, so that no other list takes their ids
        self.buckets: list[Bucket] = []
        self.plain: list[Member] = []
        self.idle: list[Tensor] = []  # have no gradient, but an average that moves with every step
        self.lasts = True  # native steps look into lists, and notice no change of another kind of sequence

    def alone(self) -> Bucket | None:
        """The bucket that is the whole step, if one is, and nothing of it lies elsewhere."""
        if len(self.buckets) != 1 or self.plain or self.buckets[0].mesh is not None:
            return None
        return self.buckets[0]

    def on_host(self) -> bool:
        """Whether the host takes part, and must know of infinities."""
        return bool(self.plain) or any(b.device.type == "cpu" for b in self.buckets)


class Preparing(Checkpoint):
    """What an algorithm says of itself, and the preparation of its steps."""

    # ---- For the algorithms -------------------------------------------------------------------------------

    _algorithm: str  # its name in step.h
    _number_names: tuple[str, ...]  # of what _numbers lists
    _unsigned: frozenset[str] = frozenset()  # states that are never negative
    _all_params: list[Tensor]
    _all_states: list[Tensor]
    _traceable: bool
    _needs_whole_tensors = False  # its update of a number depends on the rest of the tensor

    def _numbers(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The hyper-parameters in the order of the rule's Group in step.h."""
        raise NotImplementedError

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The states that the group's parameters keep, in the order of the rule."""
        raise NotImplementedError

    def _check_options(self, options: dict[str, Any]) -> None:
        """Those of a new optimizer or group, as strictly as ``torch.optim``."""
        raise NotImplementedError

    def _unused(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Numbers that the others make of no account."""
        return ()

    def _check_numbers(self, group: dict[str, Any]) -> None:
        """What schedulers and users have set since: any number that a step can use."""
        for name, value in zip(self._number_names, self._numbers(group), strict=True):
            if type(value) in PLAIN and value == value:  # not NaN
                continue
            if name not in FLAGS and name not in self._unused(group):
                check_set(name, value)

    def _plain(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, states: dict[str, Tensor], step: float
    ) -> None:
        raise NotImplementedError

    def _initial(self, group: dict[str, Any], name: str) -> float:
        return 0.0

    def _counter(self, p: Tensor, entry: dict[str, Any], group: dict[str, Any], device: torch.device) -> Tensor | None:
        """The tensor that counts the steps of a parameter, made where missing."""
        step = entry.get("step")
        if step is None:
            step = entry["step"] = torch.zeros((), dtype=torch.float32, device=device)
        elif step.device != device:
            step = entry["step"] = step.to(device, torch.float32)  # as loaded, or made by torch
        return step

    # ---- Preparing: what a step is made of, and its checks ------------------------------------------------

    def _prepare(self, only: Tensor | None, new: list[Made]) -> Prepared:
        """Plans of all parameters with a gradient. States that are missing are made and listed in `new`."""
        for index, group in enumerate(self.param_groups):
            self._check_group(index, group)
        members, idle = self._gather(only)
        self._refuse(members)
        for m in members:
            entry = self.state.get(m.key)
            m.entry = {} if entry is None else entry
            made = Made(m.key, m.entry, None if entry is None else frozenset(entry))
            new.append(made)
            self._complete(m)
            self._check_states(m)
            m.native = m.native and self._suits_native(m)
            if not made.added():
                new.pop()
        if new and any(made.key.is_cuda for made in new):
            refuse_under_capture("states")
        groups = [group["params"] for group in self.param_groups]
        lists = [params if isinstance(params, list) else list(params) for params in groups]
        prepared = Prepared(self._asked(), lists)
        prepared.lasts = all(map(operator.is_, lists, groups))
        prepared.plain = [m for m in members if not m.native]
        buckets: dict[Any, list[Member]] = {}
        for m in members:
            if m.native:
                dtype = m.param.dtype if m.param.device.type == "cuda" else None
                buckets.setdefault((m.param.device, dtype, *sharded_over(m.key)), []).append(m)
        extras = self._extras
        for (device, _, mesh, dims), bucket in buckets.items():
            items = [
                m.native_item(
                    self._unsigned,
                    extras.stochastic_rounding and m.param.dtype in HALVES,
                    extras.rounds_states,
                )
                for m in bucket
            ]
            assert native.module is not None
            step = native.module.PreparedStep(self._algorithm, items, lists if only is None else [], idle)
            prepared.buckets.append(Bucket(step, bucket, device, mesh, dims))
        if members and only is None and extras.ema_decay is not None:
            prepared.idle = [p for p in idle if "ema" in (self.state.get(p) or {})]
        return prepared

    def _asked(self) -> list[Any]:
        """What of the groups decides how a step is prepared; native steps look into the lists of parameters."""
        return [
            (self._names(group), group.get("fused"), group.get("capturable"), id(group["params"]))
            for group in self.param_groups
        ]

    def _check_group(self, index: int, group: dict[str, Any]) -> None:
        try:
            self._check_numbers(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"param_groups[{index}]: {error}") from None

    def _gather(self, only: Tensor | None) -> tuple[list[Member], list[Tensor]]:
        """Members without their states, and the parameters that have no gradient."""
        members, idle = [], []
        devices = native_devices()
        number = -1
        for index, group in enumerate(self.param_groups):
            wants_native = group.get("fused", vars(self).get("_fused")) is not False
            names = self._names(group)
            for i, p in enumerate(group["params"]):
                number += 1
                if only is not None and p is not only:
                    continue
                grad = p.grad
                if grad is None:
                    idle.append(p)
                    continue
                if is_dtensor(p):
                    self._check_distributed(p, grad, index, i)
                local, local_grad = local_of(p), local_of(grad)
                self._check_grad(local, local_grad, index, i)
                is_native = (
                    wants_native
                    and local.device.type in devices
                    and runs_on(local.device)
                    and local.dtype in NATIVE_DTYPES
                    and local_grad.dtype is local.dtype
                    and type(local) in PLAIN_TYPES
                    and type(local_grad) in PLAIN_TYPES
                )
                members.append(Member(p, local, index, number, is_native, {}, names))
        return members, idle

    def _check_grad(self, p: Tensor, grad: Tensor, group: int, i: int) -> None:
        """autograd gives a gradient that fits; a parameter may have been changed through ``.data`` since."""
        name = self._name(group, i)
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{name} has a sparse gradient (layout {grad.layout}), which "
                f"dlfast.optim.{type(self).__name__} does not support"
            )
        if grad.shape != p.shape or grad.device != p.device:
            raise RuntimeError(
                f"the gradient of {name} has shape {tuple(grad.shape)} and is on {grad.device}; "
                f"it must have shape {tuple(p.shape)} and be on {p.device}, as the parameter"
            )
        if not grad.dtype.is_floating_point:
            raise RuntimeError(f"the gradient of {name} has dtype {grad.dtype}; it must be of floating-point numbers")

    def _check_distributed(self, p: Tensor, grad: Tensor, group: int, i: int) -> None:
        name = self._name(group, i)
        if self._needs_whole_tensors:
            raise RuntimeError(
                f"{name} is a DTensor, of which {type(self).__name__} would need norms over all processes; "
                "this is not supported"
            )
        if self._extras.state_dtype == "int8":
            raise RuntimeError(f"{name} is a DTensor, for which state_dtype='int8' is not supported")
        if not is_dtensor(grad) or grad.placements != p.placements:  # type: ignore[attr-defined]
            raise RuntimeError(f"the gradient of {name} must be a DTensor placed as the parameter is")

    def _refuse(self, members: list[Member]) -> None:
        """What must be known of all members before any is written; a native step checks the rest of its own."""
        state_dtype = self._extras.state_dtype
        for m in members:
            p = m.param
            if self.param_groups[m.group].get("capturable") and p.device.type == "cpu":
                raise RuntimeError("capturable=True needs parameters on a GPU, but one of its group is on the CPU")
            if overlaps_itself(p):
                raise RuntimeError(f"{self._name_of(m.key)} overlaps itself in memory (expanded?); clone it first")
            if state_dtype is not None and p.dtype is torch.float64:
                raise RuntimeError(
                    f"{self._name_of(m.key)} is float64, which state_dtype={state_dtype} does not suit; leave it out"
                )
            if state_dtype == "int8" and not _without_gaps(p):
                raise RuntimeError(
                    f"{self._name_of(m.key)} of strides {p.stride()} has gaps in memory, which "
                    "state_dtype='int8' does not support; clone it first"
                )

    def _complete(self, m: Member) -> None:
        """Make the states that are missing in the member's entry."""
        extras, key, entry = self._extras, m.key, m.entry
        group = self.param_groups[m.group]
        m.step = self._counter(key, entry, group, m.param.device if m.native else torch.device("cpu"))
        m.watched = ["step"] if m.step is not None and entry.get("step") is m.step else []
        for name in m.names:
            if entry.get(name) is None:
                self._make_state(entry, name, key, self._initial(group, name))
            m.watched += [n for n in (name, name + "_scale") if n in entry]
        if extras.master_weights:
            master, dtype = MASTERS.get(key.dtype, (None, None))
            for other in {"master_low", "master_param"} & entry.keys() - {master}:
                del entry[other]  # of the dtype that the parameter had: what has been written to it since counts
            if master is not None:
                if master not in entry:
                    low = master == "master_low"
                    entry[master] = torch.zeros_like(key, dtype=dtype) if low else key.detach().float()
                m.watched.append(master)
        if extras.ema_decay is not None:
            if "ema" not in entry:
                entry["ema"] = key.detach().to(compute_dtype(key.dtype), copy=True)
            m.watched.append("ema")

    def _check_states(self, m: Member) -> None:
        """That states set by hand fit; the native step says the rest in its own terms."""
        for name in m.watched:
            value = m.state(name)
            assert value is not None
            if name == "step" or name.endswith("_scale"):
                continue
            if value.shape != m.param.shape or value.device != m.param.device:
                raise RuntimeError(
                    f"{name} of {self._name_of(m.key)} has shape {tuple(value.shape)} and is on {value.device}; "
                    f"it must have shape {tuple(m.param.shape)} and be on {m.param.device}"
                )

    def _suits_native(self, m: Member) -> bool:
        """Whether native code takes the states in the dtypes they have: after a change of the parameter's, they
        keep theirs, as in ``torch.optim``."""
        real = compute_dtype(m.param.dtype)
        stored = (real, m.param.dtype) if real is torch.float64 else (real, m.param.dtype, torch.bfloat16)
        states = [m.state(name) for name in m.names if name + "_scale" not in m.entry]
        average = m.state("ema")
        return all(t is not None and t.dtype in stored for t in states) and (average is None or average.dtype is real)

    def _make_state(self, entry: dict[str, Any], name: str, p: Tensor, value: float) -> None:
        state_dtype = self._extras.state_dtype
        if state_dtype != "int8":
            dtype = p.dtype if state_dtype is None else state_dtype
            entry[name] = torch.full_like(p, value, dtype=dtype, memory_format=torch.preserve_format).detach()
            return
        initial = torch.full_like(p, value, dtype=torch.float32)
        codes, scale = _formats.encode(_formats.in_memory_order(initial), name not in self._unsigned)
        entry[name] = torch.empty_like(p, dtype=torch.uint8)
        _formats.in_memory_order(entry[name]).copy_(codes)
        entry[name + "_scale"] = scale

    def _name(self, group: int, i: int) -> str:
        names = self.param_groups[group].get("param_names")
        return f"parameter {names[i]!r}" if names else f"param_groups[{group}]['params'][{i}]"

    def _name_of(self, param: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p is param:
                    return self._name(index, i)
        return "a parameter"

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as ``torch.optim``; its options and parameters are checked first."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_engine(type(self).__name__, options)
            self._check_options(options)
        count = len(self.param_groups)
        super().add_param_group(param_group)
        self._prepared.clear()
        try:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                if p.is_complex():
                    raise RuntimeError(
                        f"{self._name(count, i)} is complex ({p.dtype}), which is not supported; "
                        "optimize torch.view_as_real of it"
                    )
                if not is_dtensor(p) and overlaps_itself(p):
                    raise RuntimeError(
                        f"{self._name(count, i)} of shape {tuple(p.shape)} and strides {p.stride()} overlaps "
                        "itself in memory (expanded?); clone it first"
                    )
        except RuntimeError:
            self.param_groups.pop()
            raise
        finally:
            self._list_params()

    def _list_params(self) -> None:
        self._all_params = [p for group in self.param_groups for p in group["params"]]
        # Of other subclasses of Tensor a graph takes the parts, not the whole.
        self._traceable = all(type(p) in PLAIN_TYPES for p in self._all_params)

    def _list_states(self) -> list[Tensor]:
        """All tensors in `state` that a step writes."""
        known = self._entry_names()
        entries = [entry for p, entry in self.state.items() if isinstance(p, Tensor) and isinstance(entry, dict)]
        return [v for entry in entries for n, v in entry.items() if n in known and isinstance(v, Tensor)]


def _without_gaps(p: Tensor) -> bool:
    return p.numel() == 0 or torch.empty_like(p).stride() == p.stride()
