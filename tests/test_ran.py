"""What ran is counted by the operators themselves, and `explain` shows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dlfast
from dlfast import ran
from tests.support.native import needs_native
from tests.support.program import python

pytestmark = needs_native


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "winograd2")


def counted(seen: list[ran.Ran]) -> dict[tuple[str, str, str], int]:
    assert {each.device for each in seen} <= {"cpu"}
    return {(each.operator, each.part, each.algorithm): each.calls for each in seen}


def test_each_part_is_counted_once_a_call(forced):
    block, x = dlfast.nn.ConvReLUPool2d(16, 16, 3, padding=1), torch.randn(2, 16, 8, 8, requires_grad=True)
    with ran.watch() as seen:
        for _ in range(3):
            block(x).sum().backward()
        block(x.detach())
    conv = "conv_relu_pool2d"
    assert counted(seen) == {
        (conv, "forward", "winograd2"): 4,
        (conv, "grad_input", "sparse"): 3,
        (conv, "grad_weight", "rows" if (conv, "grad_weight", "rows") in counted(seen) else "sparse"): 3,
    }


def test_what_is_not_finite_ends_with_pytorch(forced):
    """Winograd's sums cannot tell: PyTorch's kernels do, and they are what is counted."""
    block, x = dlfast.nn.ConvReLUPool2d(16, 16, 3, padding=1), torch.full((2, 16, 8, 8), torch.inf)
    with ran.watch() as seen, torch.no_grad():
        block(x)
    assert counted(seen) == {
        ("conv_relu_pool2d", "forward", "pytorch"): 1,
        ("relu_pool2d", "forward", "pass"): 1,
    }


def test_normalisation_and_the_pass_alone_are_counted():
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with ran.watch() as seen:
        dlfast.nn.BNReLUPool2d(4)(x).sum().backward()
        dlfast.nn.relu_pool2d(x).sum().backward()
    assert counted(seen) == {
        (operator, part, "pass"): 1
        for operator in ("batch_norm_relu_pool2d", "relu_pool2d")
        for part in ("forward", "backward")
    }


def test_nothing_ran_where_nothing_was_computed():
    with ran.watch() as seen:
        dlfast.explain(dlfast.nn.ConvReLUPool2d(3, 8, 3), torch.randn(1, 3, 8, 8))
        dlfast.nn.ConvReLUPool2d(3, 8, 3)(torch.empty(0, 3, 8, 8))
    assert seen == []


def test_explain_shows_what_ran_and_leaves_all_as_it_was(forced):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, state = torch.randn(2, 8, 10, 10), torch.get_rng_state()
    shown = dlfast.explain(model, x, ran=True)
    parts = {(each.operator, each.part) for each in shown.ran}
    assert parts == {
        ("conv_relu_pool2d", "forward"), ("conv_relu_pool2d", "grad_weight"),
        ("batch_norm_relu_pool2d", "forward"), ("batch_norm_relu_pool2d", "backward"),
    }  # fmt: skip
    assert "ran: conv_relu_pool2d forward: winograd2 on cpu, 1x" in str(shown)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert dlfast.explain(model, x).ran is None


@pytest.mark.parametrize("training", [True, False])
def test_explain_of_a_block_runs_a_backward_only_where_gradients_are_enabled(forced, training):
    block, x = dlfast.nn.ConvReLUPool2d(8, 8, 3), torch.randn(2, 8, 10, 10)
    with torch.set_grad_enabled(training):
        shown = dlfast.explain(block, x, ran=True)
    assert {each.part for each in shown.ran} == ({"forward", "grad_weight"} if training else {"forward"})
    assert block.weight.grad is None


def test_explain_without_inputs_cannot_run():
    with pytest.raises(TypeError, match="ran=True needs the inputs"):
        dlfast.explain(nn.Sequential(nn.Conv2d(3, 3, 3)), ran=True)


def test_a_carried_algorithm_that_does_not_take_the_problem_is_refused():
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 4, 5, 5)
    window = ((1, 1), (0, 0), (1, 1), 1, "relu", "max", (2, 2), (2, 2), (0, 0), False)
    op = torch.ops.dlfast._conv_relu_pool2d
    names = ["eager", "pytorch", "direct", "winograd2"]
    for refused in ("eager", "winograd2"):
        with pytest.raises(RuntimeError, match=f"{refused} does not compute forward of this problem"):
            op(x, weight, None, *window, True, [names.index(refused), -1, -1])
    with pytest.raises(ValueError, match="algorithms must be between -1"):
        op(x, weight, None, *window, True, [99, -1, -1])
    with ran.watch() as seen:
        op(x, weight, None, *window, True, [names.index("direct"), -1, -1])
    assert counted(seen) == {("conv_relu_pool2d", "forward", "direct"): 1}


def test_the_old_names_of_variables_still_work_and_warn(monkeypatch):
    monkeypatch.setenv("DLFAST_PLAN", "epilogue")
    monkeypatch.delenv("DLFAST_ALGORITHM", raising=False)
    program = (
        "import torch, dlfast\n"
        "print(dlfast.explain(dlfast.nn.ConvReLUPool2d(16, 16, 3), torch.randn(1, 16, 9, 9)).forward)\n"
    )
    done = python("-c", program, check=True)
    assert done.stdout == "pytorch\n"
    assert "FutureWarning: dlfast: DLFAST_PLAN is deprecated: set DLFAST_ALGORITHM instead" in done.stderr
    assert "FutureWarning: dlfast: the algorithm 'epilogue' is called 'pytorch' now" in done.stderr


def test_tracing_does_not_make_a_choice_a_constant():
    """A traced program runs on other sizes, whose best algorithm may be another."""
    from torch.fx.experimental.proxy_tensor import make_fx

    weight = torch.randn(16, 16, 3, 3)
    traced = make_fx(lambda x: dlfast.conv_relu_pool2d(x, weight))(torch.randn(1, 16, 12, 12))
    nodes = [node for node in traced.graph.nodes if "_conv_relu_pool2d" in str(node.target)]
    assert nodes
    assert all(list(node.args[14:]) in ([], [[-1, -1, -1]]) for node in nodes)
