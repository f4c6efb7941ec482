"""A chain of layers that one fused layer can stand for, and how chains are found in a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx, nn

from dlfast.choice import BlockChoice
from dlfast.functional.window import Window
from dlfast.fusion.steps import Step, recognise
from dlfast.fusion.tracing import Level


@dataclass(frozen=True)
class Site:
    """A place whose work the head of a chain does: a node of a level's graph, in each mode."""

    level: Level
    nodes: dict[bool, fx.Node]
    module: nn.Module | None  # None: a function

    @property
    def path(self) -> str:
        """Of the module, from the level's."""
        return str(self.nodes[True].target)

    @property
    def name(self) -> str:
        node = self.nodes[True]
        if self.module is not None:
            return self.level.path(self.path)
        return getattr(node.target, "__name__", str(node.target))


@dataclass
class Tail:
    """The pooling that follows the call of a module whose forward ends in a chain."""

    level: Level  # that of the call
    calls: dict[bool, fx.Node]
    pool: Site
    window: Window
    adaptive: tuple[int | None, int | None] | None

    @property
    def path(self) -> str:
        """Of the called module, from the level's."""
        return str(self.calls[True].target)


@dataclass
class Chain:
    """One fusable chain, or one that looks fusable and is left alone."""

    head: Site
    bn: nn.BatchNorm2d | None = None
    own_window: Window = field(default_factory=lambda: Window(None, None, (1, 1), (1, 1)))
    own_adaptive: tuple[int | None, int | None] | None = None
    sites: list[Site] = field(default_factory=list)  # all but the head
    passed: list[Site] = field(default_factory=list)  # what runs after the operator, though it stands before its end
    tail: Tail | None = None
    why_not: str = ""
    stop: str = ""  # why it ends where it does, where something fusable seemed to follow
    last: Site | None = None  # whose value is the chain's
    choice: BlockChoice | None = None  # of a convolution block, where example inputs were given
    bytes_saved: int | None = None
    seconds_saved: float | None = None  # of kernels in a training step, where they were estimated
    eager_seconds: float = 0.0  # of PyTorch's kernels for its normalisation and what follows
    host_seconds: float = 0.0  # that the host takes longer in a training step

    @property
    def window(self) -> Window:
        """Activation and pooling, the tail's included."""
        return self.own_window if self.tail is None else self.tail.window

    @property
    def adaptive(self) -> tuple[int | None, int | None] | None:
        """Output size of an adaptive pooling."""
        return self.own_adaptive if self.tail is None else self.tail.adaptive

    @property
    def kind(self) -> str:
        """What the head is: "conv", "bn" or "relu"."""
        if isinstance(self.head.module, nn.Conv2d):
            return "conv"
        return "bn" if self.bn is not None else "relu"

    @property
    def name(self) -> str:
        return (
            self.head.name if self.head.module is not None else f"{self.head.level.name or 'model'}: {self.head.name}"
        )

    def describe(self) -> str:
        """For people: "conv → bn → relu → max 2x2"."""
        parts = [self.kind] if self.kind == "conv" else []
        if self.bn is not None:
            parts.append("bn")
        if self.window.activation is not None:
            parts.append("relu")
        if self.window.pool is not None:
            height, width = self.window.pool_size
            size = "adaptive" if self.adaptive is not None else f"{height}x{width}"
            parts.append(f"{self.window.pool} {size}")
        return " → ".join(parts)


@dataclass
class Run:
    """Nodes one after the other, each the only one that uses the one before."""

    steps: list[Step]
    stop: str  # why it ends where it does


def follow(start: Step, root: nn.Module) -> Run:
    """The run that begins with `start` in a graph traced from `root`."""
    steps = [start]
    while True:
        node = steps[-1].node
        users = list(node.users)
        if len(users) != 1:
            return Run(steps, "its output is used elsewhere as well" if users else "")
        step = recognise(users[0], root)
        if step.input is not node or step.kind in ("conv", "other"):
            return Run(steps, step.why_not)
        if step.why_not:
            return Run(steps, f"{step.node.target}: {step.why_not}")
        steps.append(step)


@dataclass
class Match:
    """The links of a run that fuse, and those between them that stay where they are."""

    bn: Step | None = None
    relu: Step | None = None
    pool: Step | None = None
    absorbed: list[Step] = field(default_factory=list)
    passed: list[Step] = field(default_factory=list)
    last: Step | None = None

    def pattern(self) -> tuple[str, ...]:
        """To compare the same place in two traces."""
        return tuple(f"{step.describe()} {step.node.target}" for step in (*self.absorbed, *self.passed))


def match(run: Run) -> Match:
    """The longest fusable beginning of `run`.

    A maximum is taken before what rises with its input (LeakyReLU, Dropout2d ...), which stays in place.
    """
    found = Match(last=run.steps[0])
    between: list[Step] = []
    for step in run.steps[1:]:
        if step.kind == "bn":
            if found.bn or found.relu or found.pool or between or run.steps[0].kind != "conv":
                break
            found.bn = step
        elif step.kind == "relu":
            averaged = found.pool is not None and found.pool.window is not None and found.pool.window.pool == "avg"
            if found.relu or averaged or between or run.steps[0].kind == "relu":
                break
            found.relu = step
        elif step.kind == "pool":
            assert step.window is not None
            if found.pool or (between and step.window.pool == "avg"):
                break
            if not _takes(step, run.steps[0].kind, found.bn is not None):
                break
            found.pool = step
        else:
            if found.pool:
                break
            between.append(step)
            continue
        found.absorbed.append(step)
        found.last = step
        if found.pool and between:
            found.last = between[-1]
            found.passed = between
            break
    return found


def _takes(pool: Step, head: str, normalised: bool) -> bool:
    """Whether a chain that begins with a step of kind `head` may end with `pool`.

    Only the convolution block finds its window at each call, and gains by an average.
    """
    assert pool.window is not None
    return (pool.window.pool == "max" and pool.adaptive is None) or (head == "conv" and not normalised)


def chains_of(level: Level, is_head: Callable[[Step], bool]) -> list[Chain]:
    """The chains in one level, those that must stay alone included, with the reason."""
    matched = {mode: _matches(graph, level.module, is_head) for mode, graph in level.graphs.items()}
    found = []
    for index, (start, run, here) in enumerate(matched[True]):
        there = matched[False][index] if index < len(matched[False]) else None
        chain = Chain(Site(level, {True: start.node, False: start.node}, start.module))
        found.append(chain)
        if there is None or there[0].node.target != start.node.target:
            chain.why_not = "training and evaluation run different layers"
            continue
        chain.head = replace(chain.head, nodes={True: start.node, False: there[0].node})
        if here.pattern() != there[2].pattern():
            chain.why_not = "what follows differs between training and evaluation"
            continue
        _fill(chain, start, here, there[2])
        chain.stop = run.stop
        chain.why_not = start.why_not or ("" if chain.sites else run.stop)
    return found


def _matches(graph: fx.Graph, root: nn.Module, is_head: Callable[[Step], bool]) -> list[tuple[Step, Run, Match]]:
    taken: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        step = recognise(node, root)
        if node in taken or not is_head(step):
            continue
        # What cannot be a head leaves those after it free to be one.
        run = Run([step], "") if step.why_not else follow(step, root)
        matched = match(run)
        taken.update(each.node for each in matched.absorbed)
        found.append((step, run, matched))
    return found


def _fill(chain: Chain, start: Step, here: Match, there: Match) -> None:
    level = chain.head.level
    if start.kind == "bn":
        assert isinstance(start.module, nn.BatchNorm2d)
        chain.bn = start.module
    elif here.bn is not None:
        assert isinstance(here.bn.module, nn.BatchNorm2d)
        chain.bn = here.bn.module
    relu = here.relu is not None or start.kind == "relu"
    window = here.pool.window if here.pool is not None and here.pool.window is not None else chain.own_window
    chain.own_window = replace(window, activation="relu" if relu else None)
    chain.own_adaptive = here.pool.adaptive if here.pool is not None else None
    for one, other in zip(here.absorbed, there.absorbed, strict=True):
        chain.sites.append(Site(level, {True: one.node, False: other.node}, one.module))
    for one, other in zip(here.passed, there.passed, strict=True):
        chain.passed.append(Site(level, {True: one.node, False: other.node}, one.module))
    assert here.last is not None
    assert there.last is not None
    chain.last = Site(level, {True: here.last.node, False: there.last.node}, here.last.module)


def extend(chain: Chain, level: Level, nodes: dict[bool, fx.Node]) -> None:
    """Let a chain that ends its module's forward take the pooling that follows the module's call.

    `nodes` are the call of that module in `level`, in each mode.
    """
    found: dict[bool, Step] = {}
    for mode, node in nodes.items():
        users = list(node.users)
        if len(users) != 1 or len(node.args) + len(node.kwargs) != 1 or len(node.all_input_nodes) != 1:
            return
        step = recognise(users[0], level.module)
        if step.kind != "pool" or step.why_not or step.input is not node:
            return
        found[mode] = step
    if found[True].describe() != found[False].describe() or found[True].node.target != found[False].node.target:
        return
    step = found[True]
    assert step.window is not None
    if not _takes(step, chain.kind, chain.bn is not None):
        return
    site = Site(level, {mode: each.node for mode, each in found.items()}, step.module)
    window = replace(step.window, activation=chain.own_window.activation)
    chain.tail = Tail(level, nodes, site, window, step.adaptive)
