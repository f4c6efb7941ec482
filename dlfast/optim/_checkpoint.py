"""State dicts of the optimizers: those of ``torch.optim``, and what the extra options add to them.

Beside the states of the algorithm an entry may hold ``ema``, ``master_low`` or ``master_param``, and for
each int8 state its ``_scale``. Where states have a format of their own, each group has a ``dlfast_format``
that names it and carries the seed of random rounding. Anything else in an entry or a group is somebody
else's, a wrapper's perhaps: it is kept, and loaded as ``torch.optim`` loads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from dlfast.optim import _formats
from dlfast.optim._members import compute_dtype, is_dtensor
from dlfast.optim._options import Extras

# Which code runs a step is the choice of the optimizer at hand, not of a checkpoint.
ENGINE_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
FORMAT = "dlfast_format"
EXTRA_ENTRIES = ("ema", "master_low", "master_param")
# States by which entries of another algorithm are known, where the options of its groups do not tell.
KNOWN_STATES = frozenset(
    ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum")
    + ("exp_inf", "acc_delta", "mu_product", "row_var", "col_var", "exp_avg_lr_1")
)
# What a parameter of 16 bits keeps as its master, and in which dtype.
MASTERS = {torch.bfloat16: ("master_low", torch.int16), torch.float16: ("master_param", torch.float32)}


class _Shielded:
    """A value on its way through ``load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Checkpoint(torch.optim.Optimizer):
    """Saving, loading, copying and pickling of a fused optimizer."""

    # State tensors with the parameter's shape, as in the state_dict of torch.optim.
    _state_names: tuple[str, ...] = ()
    # Options that tell a state_dict of this algorithm from another's, and some that it has not.
    _own_options: tuple[str, ...] = ()
    _foreign_options: tuple[str, ...] = ()
    # States without which an entry is of no use.
    _required: tuple[str, ...] = ()
    # Whether `step` in an entry is this library's.
    _counts_steps = True

    _extras: Extras
    _unsigned: frozenset[str]
    _seed: int
    _random_step: int
    _prepared: dict[Any, Any]
    _checked: list[Any]
    _all_states: list[Tensor]

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of ``torch.optim``, with `step` on the CPU unless `fused` or `capturable`.

        On CUDA this waits for the device; during training `step` lives there.
        """
        # The first of the hooks, so that those of others see what is saved.
        handle = self.register_state_dict_post_hook(_complete_saved, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _complete_saved(self, saved: dict[str, Any]) -> None:
        """Bring what ``torch.optim`` has packed into the layout of a checkpoint."""
        format_ = self._format()
        state = saved["state"]
        for group, own in zip(saved["param_groups"], self.param_groups, strict=True):
            if format_:
                group[FORMAT] = dict(format_)
            on_device = group.get("fused") or group.get("capturable")
            for i, p in zip(group["params"], own["params"], strict=True):
                entry = state.get(i)
                if not entry or not isinstance(entry, dict):
                    continue
                kept = self._saved_entry(p, entry)
                step = kept.get("step") if self._counts_steps else None
                if isinstance(step, Tensor) and step.device.type != "cpu" and not on_device:
                    kept = {**kept, "step": step.cpu()}
                if kept:
                    state[i] = kept
                else:
                    del state[i]

    def _saved_entry(self, p: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """What of the `entry` of `p` is saved."""
        return entry

    def _format(self) -> dict[str, Any]:
        extras = self._extras
        if extras.state_dtype is None and not extras.draws and not extras.master_weights:
            return {}
        format_: dict[str, Any] = {"version": _formats.CODE_VERSION, "state_dtype": str(extras.state_dtype)}
        if extras.draws:
            # As text: 64 bits do not survive every way of saving a number.
            format_ |= {"seed": str(self._seed), "random_step": str(self._random_steps_taken())}
        return format_

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this algorithm, of this library or of ``torch.optim``.

        States are brought into the format of this optimizer's `state_dtype`, whatever theirs is.

        Raises:
            ValueError: it is of another algorithm, lacks an entry, has one of a wrong shape or dtype or of an
                unknown version of the int8 format, or holds averages or master weights that this optimizer
                does not keep; nothing has been changed then.
        """
        handle = self.register_load_state_dict_pre_hook(_shield)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_extras", "_seed", "grad_norm", "_skipped", "_fused", "_shards", "grad_scale", "found_inf")
        kept = {name: vars(self)[name] for name in own if name in vars(self)}
        return {**super().__getstate__(), **kept, "_random_step": self._random_steps_taken()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        random: tuple[int, int] | None = None
        if "_extras" in state:  # a copy of a whole optimizer, not a state_dict
            self._set_extras({})
        else:
            self._check_loaded(state)
            random = self._adopt(state)
        whole = state["state"]
        # torch.optim takes each entry for one of a parameter that has taken a step.
        stepped = {k: v for k, v in whole.items() if isinstance(k, Tensor) and isinstance(v, dict) and "step" in v}
        super().__setstate__({**state, "state": stepped})
        self.state = whole
        for group in self.param_groups:
            group.setdefault("maximize", False)
        if random is not None:
            self._seed, count = random
            self._set_random_steps(count)
        self._prepared = {}
        self._checked = []
        self._list_params()
        self._all_states = []
        self._extras.changed = True

    def _set_extras(self, extra: dict[str, Any]) -> None:
        raise NotImplementedError

    def _list_params(self) -> None:
        raise NotImplementedError

    def _random_steps_taken(self) -> int:
        raise NotImplementedError

    def _set_random_steps(self, count: int) -> None:
        raise NotImplementedError

    # ---- Checks, before anything changes --------------------------------------------------------------------

    def _check_loaded(self, state: dict[str, Any]) -> None:
        name = type(self).__name__
        for index, (group, own) in enumerate(zip(state["param_groups"], self.param_groups, strict=True)):
            missing = [option for option in self._own_options if option not in group]
            if missing:
                raise ValueError(
                    f"param_groups[{index}] of the state_dict lacks {', '.join(missing)}: it is not one of {name}"
                )
            foreign = [option for option in self._foreign_options if option in group and option not in own]
            if foreign:
                raise ValueError(
                    f"param_groups[{index}] of the state_dict has {', '.join(foreign)}: it is not one of {name}"
                )
            version = group.get(FORMAT, {}).get("version", _formats.CODE_VERSION)
            if version != _formats.CODE_VERSION:
                raise ValueError(
                    f"the states in the state_dict have format version {version}; this version of dlfast reads "
                    f"{_formats.CODE_VERSION}"
                )
            for i, p in enumerate(group["params"]):
                where = f"parameter {i} of param_groups[{index}]"
                entry = state["state"].get(p)
                if isinstance(entry, dict):
                    self._check_entry(p, entry, where)

    def _entry_names(self) -> frozenset[str]:
        """All that this optimizer may keep in an entry of `state`."""
        scales = (name + "_scale" for name in self._state_names)
        return frozenset((*self._state_names, *scales, *EXTRA_ENTRIES, *(("step",) if self._counts_steps else ())))

    def _check_entry(self, p: Tensor, entry: dict[str, Any], where: str) -> None:
        known = self._entry_names()
        others = [name for name in entry if name in KNOWN_STATES and name not in known]
        lacking = [name for name in self._required if entry.get(name) is None]
        # An entry with neither may be a wrapper's, of a parameter that has taken no step.
        if lacking and (others or not known.isdisjoint(entry)):
            raise ValueError(f"the state_dict lacks {', '.join(lacking)} of {where}")
        if others:
            raise ValueError(
                f"the state_dict has {', '.join(others)} of {where}, which {type(self).__name__} does not keep"
            )
        scales = tuple(name + "_scale" for name in self._state_names)
        for name, value in entry.items():
            value = value.value if isinstance(value, _Shielded) else value
            if value is None or name not in known:
                continue
            if name == "step":
                _check_step(value, where)
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} in the state_dict must be a tensor for {where}, got {type(value).__name__}")
            shape = (_formats.blocks_of(p.numel()),) if name in scales else tuple(p.shape)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} in the state_dict has shape {tuple(value.shape)} for {where}, which needs {shape}"
                )
            if value.dtype is torch.uint8 and name + "_scale" not in entry:
                raise ValueError(f"the state_dict lacks {name}_scale of {where}")
            if name == "ema" and self._extras.ema_decay is None:
                raise ValueError(
                    "the state_dict holds averages (ema); construct the optimizer with ema_decay= to take them"
                )
            if name.startswith("master") and not self._extras.master_weights:
                raise ValueError(
                    f"the state_dict holds master weights ({name}); construct the optimizer with master_weights=True "
                    "to take them"
                )
            if name.startswith("master") and (name, value.dtype) != MASTERS.get(p.dtype):
                takes = " of ".join(map(str, MASTERS.get(p.dtype, ("no master weights",))))
                raise ValueError(
                    f"the state_dict holds {name} of {value.dtype} for {where}, which is {p.dtype} and takes {takes}"
                )

    # ---- Into this optimizer's formats ------------------------------------------------------------------------

    def _adopt(self, state: dict[str, Any]) -> tuple[int, int] | None:
        """Bring loaded states into format and layout, once instead of at every step; their seed and count of
        steps with random numbers. Nothing of this optimizer is changed yet."""
        random: tuple[int, int] | None = None
        for group, own in zip(state["param_groups"], self.param_groups, strict=True):
            group.update({name: own[name] for name in ENGINE_OPTIONS if name in own})
            format_ = group.pop(FORMAT, {})
            if "seed" in format_:
                random = int(format_["seed"]), int(format_["random_step"])
        adopted: defaultdict[Any, Any] = defaultdict(dict)
        for p, entry in state["state"].items():
            is_own = isinstance(p, Tensor) and isinstance(entry, dict)
            adopted[p] = dict(self._adopted(p, _unshielded(entry))) if is_own else entry
        state["state"] = adopted
        return random

    def _adopted(self, p: Tensor, entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        known = self._entry_names()
        for name, value in entry.items():
            if value is None or name not in known:
                yield name, value
            elif name in self._state_names:
                yield from self._converted(p, name, value, entry.get(name + "_scale"))
            elif name == "ema":
                yield name, _laid_out(p, value, compute_dtype(p.dtype))
            elif name in ("master_low", "master_param"):
                yield name, _laid_out(p, value, value.dtype)
            elif name == "step":
                yield name, _counter_of(value)

    def _converted(self, p: Tensor, name: str, value: Tensor, scale: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        signed = name not in self._unsigned
        coded = value.dtype is torch.uint8
        state_dtype = self._extras.state_dtype
        if state_dtype == "int8" and coded and value.stride() == p.stride():
            assert scale is not None
            yield name, value.to(p.device, copy=True)
            yield name + "_scale", scale.to(p.device, copy=True)
            return
        if coded:
            assert scale is not None
            numbers = torch.empty_like(value, dtype=torch.float32)
            decoded = _formats.decode(_formats.in_memory_order(value), scale, signed)
            _formats.in_memory_order(numbers).copy_(decoded)
            value = numbers
        if state_dtype != "int8":
            yield name, _laid_out(p, value, p.dtype if state_dtype is None else state_dtype)
            return
        exact = _laid_out(p, value, torch.float32)
        codes, scales = _formats.encode(_formats.in_memory_order(exact), signed)
        laid_out = torch.empty_like(p, dtype=torch.uint8)
        _formats.in_memory_order(laid_out).copy_(codes)
        yield name, laid_out
        yield name + "_scale", scales


def _complete_saved(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    assert isinstance(optimizer, Checkpoint)
    optimizer._complete_saved(saved)


def _shield(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, Checkpoint)
    known = optimizer._entry_names() - {"step"}
    ids = {i for group in state_dict["param_groups"] for i in group["params"]}

    def is_shielded(name: str, value: Any) -> bool:
        # A text would be rebuilt from its letters, and lost.
        return isinstance(value, str) or (isinstance(value, Tensor) and name in known)

    def shielded(key: Any, entry: Any) -> Any:
        if key not in ids or not isinstance(entry, dict):
            return entry
        return {name: _Shielded(v) if is_shielded(name, v) else v for name, v in entry.items()}

    return {**state_dict, "state": {k: shielded(k, entry) for k, entry in state_dict["state"].items()}}


def _unshielded(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: v.value if isinstance(v, _Shielded) else v for name, v in entry.items()}


def _check_step(value: Any, where: str) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"step in the state_dict has shape {tuple(value.shape)} for {where}; it must be one number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"step in the state_dict must be a number for {where}, got {type(value).__name__}") from None
    if not number >= 0:  # NaN too
        raise ValueError(f"step in the state_dict must be at least 0 for {where}, got {number:g}")


def _counter_of(step: Any) -> Tensor:
    """As the step counts: a float tensor of no dimensions, and of this entry alone."""
    if not isinstance(step, Tensor):
        return torch.tensor(float(step), dtype=torch.float32)
    dtype = torch.float64 if step.dtype is torch.float64 else torch.float32
    return step.to(dtype, copy=True).reshape(())


def _laid_out(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` on the device of `p`, in `dtype` and, where `p` has no gaps, in its memory layout."""
    if is_dtensor(p) or value.stride() == p.stride():
        return value.to(p.device, dtype)
    return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).detach().copy_(value)
