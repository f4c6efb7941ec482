"""Random sequences of what users do, to a plain model and to the fused one: after each, the two agree.

A thousand sequences, always the same. ``DLFAST_SEQUENCES`` asks for that many others; `.ci/nightly` sets a hundred
thousand.
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import nn

import dlfast
from dlfast.fusion import NotFusedWarning
from tests.fusion.actions import ACTIONS, COPIES, IMAGES, MODELS, WAYS
from tests.fusion.helpers import recorded
from tests.support.native import needs_native

pytestmark = needs_native

ASKED = os.environ.get("DLFAST_SEQUENCES")
SEQUENCES = int(ASKED or "1000")
PARTS = 4
# Shrinking a failure takes minutes: only where one looks for its cause.
PHASES = list(Phase) if os.environ.get("DLFAST_SHRINK") else [Phase.explicit, Phase.generate]
PREPARED: dict[str, tuple[nn.Module, nn.Module]] = {}


def prepared(make) -> tuple[nn.Module, nn.Module]:
    """A plain model and the same fused; made once, since looking at a model takes longer than a sequence."""
    if make.__name__ not in PREPARED:
        torch.manual_seed(0)
        plain = make().double()
        fused = dlfast.fuse(copy.deepcopy(plain), inplace=True)
        with recorded() as ran:
            copy.deepcopy(fused)(torch.randn(IMAGES, dtype=torch.float64))
        assert ran, f"{make.__name__} does not run fused at all"
        PREPARED[make.__name__] = plain, fused
    plain, fused = PREPARED[make.__name__]
    return copy.deepcopy(plain), copy.deepcopy(fused)


def outcome(way, model: nn.Module, number: int):
    """What running `model` gives: output and gradients, or the type of what it raises."""
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    x = torch.randn(IMAGES, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)
    x.requires_grad_(number % 2 == 0)
    torch.default_generator.manual_seed(number)  # of all devices takes longer than the model
    model.zero_grad()
    try:
        output = way(model, x)
        if output.requires_grad:
            output.square().sum().backward()
    except Exception as error:
        return type(error)
    gradients = [p.grad for p in model.parameters()] if dtype is torch.float64 else []
    return [output.detach(), *gradients, *([x.grad] if dtype is torch.float64 else [])]


def done(action, *arguments):
    """What `action` gives for the plain and for the fused model; nothing where it raises the same for both."""
    results, errors = [], []
    for each in arguments:
        try:
            results.append(action(*each))
        except Exception as error:
            errors.append(error)
    assert [type(error) for error in errors] in ([], [type(error) for error in errors[:1]] * 2), errors
    return None if errors else results


def assert_same(have, want, tolerance: float) -> None:
    """Equal to a rounding of the largest: a gradient that is 0 but for roundings has no scale of its own."""
    largest = [t.nan_to_num(0, 0, 0).abs().max().item() for t in want if t is not None and t.numel()]
    tolerance *= max([1.0, *largest])
    for one, other in zip(have, want, strict=True):
        if one is None or other is None:
            assert one is other
        elif not (one.shape == other.shape and one.dtype is other.dtype and (one - other).abs().max() <= tolerance):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance, equal_nan=True)  # NaN, or to tell where


def amplified(model: nn.Module, fused: nn.Module, number: int) -> float:
    """How far the roundings by which the two models differ move the output of the plain one, in parts of the largest.

    It runs once more, with the numbers of the fused one, each another rounding away; then it has its own again.
    """
    state, others = model.state_dict(keep_vars=True), fused.state_dict()
    before, grads = {name: t.detach().clone() for name, t in state.items()}, [p.grad for p in model.parameters()]
    generator = torch.Generator().manual_seed(number)
    own = outcome(WAYS[0], model, number)
    with torch.no_grad():
        for name, tensor in state.items():
            value = others[name]
            if value.is_floating_point():
                noise = torch.empty(value.shape, dtype=torch.float64).uniform_(-1, 1, generator=generator)
                value = (value.double() * (1 + torch.finfo(torch.float32).eps * noise)).to(value.dtype)
            tensor.copy_(value)
    moved = outcome(WAYS[0], model, number)
    with torch.no_grad():
        for name, value in before.items():
            state[name].copy_(value)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    if isinstance(own, type) or isinstance(moved, type):
        return 0.0
    return 4 * ((moved[0] - own[0]).abs().max() / own[0].abs().max().clamp(min=1)).item()


class SideBySide(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.over = False
        self.tolerance = 1e-9

    @initialize(make=st.sampled_from(MODELS), training=st.booleans())
    def start(self, make, training):
        self.plain, self.fused = (model.train(training) for model in prepared(make))

    @rule(action=st.sampled_from([*ACTIONS, *COPIES]), index=st.integers(0, 400))
    def do(self, action, index):
        if self.over:
            return
        if action in COPIES:
            self.plain, self.fused = done(action, (self.plain,), (self.fused,)) or (self.plain, self.fused)
        else:
            done(action, (self.plain, index), (self.fused, index))
        self.run_both(WAYS[0], index)

    @rule(way=st.sampled_from(WAYS), seed=st.integers(0, 7))
    def run_both(self, way, seed):
        if self.over:
            return
        want, have = outcome(way, self.plain, seed), outcome(way, self.fused, seed)
        if isinstance(want, type) or isinstance(have, type):
            assert have is want
            self.over = True  # statistics may have moved on before the error
            return
        single = have[0].dtype is not torch.float64
        if single:
            self.tolerance = 2e-3  # from now on: statistics have taken in its roundings
        state = self.plain.state_dict()
        assert list(self.fused.state_dict()) == list(state)
        assert_same(list(self.fused.state_dict().values()), list(state.values()), self.tolerance)
        if single and amplified(self.plain, self.fused, seed) > self.tolerance:
            self.over = True  # of a model that makes that much of a rounding its output tells nothing
            return
        assert_same(have, want, self.tolerance)


@pytest.fixture
def one_thread():
    """Threads that wait for each other take ten times as long on images of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))  # for as many processes
def test_a_fused_model_follows_whatever_is_done_to_it(part):
    machine = type("SideBySide", (SideBySide,), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotFusedWarning)
        run_state_machine_as_test(
            machine if ASKED else seed(part)(machine),
            settings=settings(
                max_examples=SEQUENCES // PARTS, stateful_step_count=8, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
                phases=PHASES,
            ),
        )  # fmt: skip
