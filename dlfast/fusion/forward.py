"""The forward of a module with fused chains: it stands on the instance, in front of the class's own.

The class, its other methods, its children and their names stay what they are. Where something is no longer as it
was, or somebody looks on who would see fewer layers than there are, the class's own forward runs.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks

from dlfast.functional.modes import is_exporting, is_transformed
from dlfast.functional.window import Window
from dlfast.fusion.generate import Source, compiled
from dlfast.fusion.guard import Guard
from dlfast.fusion.run import AdaptiveSize, ChainRun, NotFusedWarning, PooledChainRun, Run, pool

REPLICATE = "_replicate_for_data_parallel"


class FusedForward:
    """Runs generated code for a module, in which its chains are fused operators.

    It holds the module weakly: no cycle keeps a model alive that nobody else holds.
    """

    def __init__(
        self, module: nn.Module, guard: Guard, sources: dict[bool, Source], runs: dict[str, Run]
    ) -> None:  # fmt: skip
        self._guard, self._sources, self._runs = guard, sources, runs
        self._with_pool: dict[bool, Source] = {}
        self._pool: tuple[Window, AdaptiveSize | None] | None = None
        self._said: set[str] = set()
        self._bind(module)

    def take_pool(self, tail: str, run: PooledChainRun) -> None:
        """Let `pooled` run the chain that the code calls `tail` as `run`, which has a pooling after it."""
        name = f"{tail}_pooled"
        self._runs[name] = run
        self._with_pool = {mode: source.renamed(tail, name) for mode, source in self._sources.items()}
        self._pool = run.window, run.adaptive
        self._compile()

    def _bind(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._guard.bind(module)
        self._compile()

    def _compile(self) -> None:
        label = f"<dlfast.fuse of {type(self._own()).__name__}.forward>"
        self._code = {mode: compiled(source, self._runs, label) for mode, source in self._sources.items()}
        self._pooled_code = {mode: compiled(source, self._runs, label) for mode, source in self._with_pool.items()}

    def _own(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the fused module is gone: keep the module itself, not its forward alone")
        return module

    @property
    def chains(self) -> list[ChainRun]:
        """Those that run in this forward."""
        return [run for run in self._runs.values() if isinstance(run, ChainRun)]

    # ---- Calls -------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._own()
        if not self._ready(module, args):
            return type(module).forward(module, *args, **kwargs)
        return self._code[bool(module.training)](module, *args, **kwargs)

    def pooled(self, input: Any) -> Tensor:
        """The forward, then the pooling of :meth:`take_pool`."""
        module = self._own()
        assert self._pool is not None
        if not self._ready(module, (input,)):
            return pool(type(module).forward(module, input), *self._pool)
        output: Tensor = self._pooled_code[bool(module.training)](module, input)
        return output

    @property
    def takes_pool(self) -> bool:
        """Whether there is :meth:`pooled`."""
        return self._pool is not None

    def _ready(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the generated code stands for the forward of `module` now."""
        if torch.compiler.is_compiling():
            return not is_exporting() and self._guard.flags_hold(module) and self._held()
        watched = module_hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
        if watched or torch._C._get_tracing_state() is not None or is_transformed():
            return False
        if any(isinstance(value, fx.Proxy) for value in args):
            return False
        change = self._guard.change(module)
        if change:
            self._say(module, change)
        return not change

    def _held(self) -> bool:
        """Whether all is as it was, as a constant of compiled code."""
        module = self._own()
        links = [link for run in self._runs.values() for link in run.links]
        return not self._guard.change(module) and not any(link.change(module) for link in links)

    # What torch.compiler.assume_constant_result does, which would import all of torch._dynamo with dlfast.
    _held._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _say(self, module: nn.Module, change: str) -> None:
        if change not in self._said:
            self._said.add(change)
            warnings.warn(
                f"the fused {type(module).__name__} runs as plain PyTorch: {change}", NotFusedWarning, stacklevel=3
            )

    # ---- Other methods of the module that must know --------------------------------------------------------

    def train(self, mode: bool = True) -> nn.Module:
        """As of the class; also forgets what was folded, for weights that were written without a trace."""
        for run in self.chains:
            run.fold.drop()
        module = self._own()
        return type(module).train(module, mode)

    def replicate(self) -> nn.Module:
        """For ``nn.DataParallel``: a replica is plain."""
        module = self._own()
        replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
        for name in INSTANCE:
            replica.__dict__.pop(name, None)
        return replica

    # ---- To look like the forward of the class, and to be copied with the module -----------------------------

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self._own()).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """Where torch.export looks for the code that runs."""
        code: CodeType = type(self._own()).forward.__code__
        return code

    @property
    def __globals__(self) -> dict[str, Any]:
        """What torch.jit.script asks for first.

        Raises:
            AttributeError: always, with what to do instead.
        """
        raise AttributeError("torch.jit.script cannot compile a fused model: script dlfast.unfuse(model)")

    def __getstate__(self) -> dict[str, Any]:
        for link in (link for run in self._runs.values() for link in run.links):
            link.forget_unless_found(self._own())
        state = {name: value for name, value in self.__dict__.items() if name not in ("_code", "_pooled_code")}
        return {**state, "_module": self._own()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind(state["_module"])


INSTANCE = ("forward", "train", REPLICATE)


def put(module: nn.Module, forward: FusedForward) -> None:
    """Put `forward` in front of the forward of `module`."""
    module.__dict__.update({"forward": forward, "train": forward.train, REPLICATE: forward.replicate})


def forward_of(module: nn.Module) -> FusedForward | None:
    """The forward that `put` has put there, unless somebody has replaced it."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, FusedForward) else None


def is_put(module: nn.Module) -> bool:
    """Whether `put` was called of `module`, whatever has become of its forward since."""
    return isinstance(getattr(module.__dict__.get("train"), "__self__", None), FusedForward)


def take_back(module: nn.Module) -> None:
    """Undo `put`."""
    for name in INSTANCE:
        module.__dict__.pop(name, None)
