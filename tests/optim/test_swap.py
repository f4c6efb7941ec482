"""Tensors that change behind their Python objects between steps: no plan holds them or goes on with what they were."""

import copy

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast._native import native
from tests.optim.cases import OPTIONS, TORCH_NAMES, assert_same, by_name, engines, ran_natively, set_grads
from tests.support.native import needs_native


@pytest.fixture(params=[False, True], ids=["data", "swap"])
def converts_by(request):
    """How Module.to() and load_state_dict() change parameters: through ``.data``, or by swapping tensors."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def build(lib, name, dtype=torch.float64, **extra):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 5)).to(dtype)
    options = {k: v for k, v in OPTIONS[name].items() if k != "amsgrad"}
    return model, getattr(lib, name)(model.parameters(), **{**options, **extra})


def train(generator, runs, count):
    for _ in range(count):
        set_grads(generator, *(list(model.parameters()) for model, _ in runs))
        for _, opt in runs:
            opt.step()


def conversions():
    def same(model, opt):
        model.to(torch.float64)

    def moved(model, opt):
        for p in model.parameters():
            p.data = p.data.clone()

    def other_layout(model, opt):
        model[0].weight.data = model[0].weight.data.t().contiguous().t()

    def through_another_dtype(model, opt):
        model.to(torch.bfloat16).to(torch.float64)

    def loaded(model, opt):
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})

    def assigned(model, opt):
        """The optimizer keeps the old parameters, which then have no gradient."""
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)

    def no_gradient(model, opt):
        model[0].weight.grad = None

    def swapped(model, opt):
        opt.zero_grad()
        for p in model.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(p.detach() + 1))

    def swapped_states(model, opt):
        for entry in opt.state.values():
            for value in entry.values():
                torch.utils.swap_tensors(value, value.clone())

    def shared(model, opt):
        for entry in opt.state.values():
            for value in entry.values():
                value.data = value.data.clone()
                value.share_memory_()

    return list(locals().values())


@engines
@pytest.mark.parametrize("change", conversions(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_steps_after_a_change_are_torchs(name, change, fused, converts_by):
    runs = [build(torch.optim, name), build(dlfast.optim, name, fused=fused)]
    own = [[p for group in opt.param_groups for p in group["params"]] for _, opt in runs]
    generator = torch.Generator().manual_seed(1)
    train(generator, runs, 3)
    for run in runs:
        change(*run)
    if change.__name__ == "no_gradient":
        for _, opt in runs:
            opt.step()
    train(generator, runs, 3)
    for p, q in zip(own[1], own[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for p, q in zip(runs[1][0].parameters(), runs[0][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    if change.__name__ != "assigned":
        assert ran_natively(runs[1][1]) is (fused is None and native.module is not None)


# torch.optim.Adam and centered RMSprop refuse states of another dtype than the parameter's: the oracle of these is
# plain PyTorch.
CONVERTED = [
    ([torch.float32], [torch.bfloat16]),
    ([torch.float32], [torch.float16]),
    ([torch.float32], [torch.float64]),
    ([torch.float16], [torch.float32]),
    ([torch.float64], [torch.float32]),
    ([torch.float32], [torch.float16, torch.float32]),
    ([torch.bfloat16], [torch.float32, torch.bfloat16]),
]
ROUNDED = 16 * 2**-8  # of bfloat16, for each of a step or two


@engines
@pytest.mark.parametrize(("first", "then"), CONVERTED, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad"])
def test_steps_after_a_change_of_dtype_are_near_torchs(name, first, then, fused, converts_by):
    options = {"centered": False} if name == "RMSprop" else {}
    runs = [
        build(torch.optim, name, first[0], **options),
        build(dlfast.optim, name, first[0], fused=fused, **options),
    ]
    generator = torch.Generator().manual_seed(1)
    train(generator, runs, 2)
    for dtype in then:
        for model, _ in runs:
            model.to(dtype)
        train(generator, runs, 2)
    (theirs, torch_opt), (mine, opt) = runs
    half = any(d in (torch.bfloat16, torch.float16) for d in (*first, *then))
    assert_same(mine.parameters(), theirs.parameters(), ROUNDED if half else 1e-6)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert p.dtype is then[-1]
        assert opt.state[p].keys() == torch_opt.state[q].keys()
        for key, value in torch_opt.state[q].items():
            assert opt.state[p][key].dtype is value.dtype  # states keep theirs
            assert_same([opt.state[p][key].float()], [value.float()], ROUNDED if half else 1e-6)


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.5, "max_grad_norm": 1.0}], ids=["alone", "tail"])
@pytest.mark.parametrize(("first", "then"), CONVERTED, ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes))
@by_name
def test_steps_after_a_change_of_dtype_are_those_of_plain_pytorch(name, first, then, extra, converts_by):
    runs = [build(dlfast.optim, name, first[0], fused=fused, **extra) for fused in (False, None)]
    generator = torch.Generator().manual_seed(1)
    train(generator, runs, 2)
    for dtype in then:
        for model, _ in runs:
            model.to(dtype)
        train(generator, runs, 2)
    (plain, plain_opt), (mine, opt) = runs
    half = any(d in (torch.bfloat16, torch.float16) for d in (*first, *then))
    assert_same(mine.parameters(), plain.parameters(), ROUNDED if half else 1e-6)
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        assert {k: v.dtype for k, v in opt.state[p].items()} == {k: v.dtype for k, v in plain_opt.state[q].items()}


@needs_native
@by_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_with_states_of_float32_step_natively(name, dtype, converts_by):
    model, opt = build(dlfast.optim, name, torch.float32)
    generator = torch.Generator().manual_seed(1)
    train(generator, [(model, opt)], 2)
    model.to(dtype)
    train(generator, [(model, opt)], 2)
    assert ran_natively(opt)


@needs_native
@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.5}, {"state_dtype": "int8"}, {"master_weights": True}], ids=str)
@by_name
def test_a_prepared_step_holds_no_tensor(name, extra, converts_by):
    """swap_tensors refuses a tensor that is held elsewhere: parameters, those without a gradient, and states."""
    dtype = torch.bfloat16 if extra else torch.float32
    model, opt = build(dlfast.optim, name, dtype, **extra)
    train(torch.Generator().manual_seed(1), [(model, opt)], 2)
    model[1].bias.grad = None
    opt.step()
    assert ran_natively(opt)
    opt.zero_grad()
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
    for entry in opt.state.values():
        for value in entry.values():
            torch.utils.swap_tensors(value, value.clone())
    before = [p.detach().clone() for p in model.parameters()]
    train(torch.Generator().manual_seed(2), [(model, opt)], 1)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# What a plan has pointers to, beside parameters and moments.
@needs_native
@pytest.mark.parametrize(
    "extra",
    [{}, {"ema_decay": 0.5}, {"state_dtype": "int8"}, {"master_weights": True}],
    ids=["counter", "average", "scales", "masters"],
)
@pytest.mark.parametrize("how", ["data", "swap", "share"])
@by_name
def test_every_tensor_of_an_entry_may_move(name, extra, how):
    dtype = torch.float16 if "master_weights" in extra else torch.float32
    torch.manual_seed(0)
    still = build(dlfast.optim, name, dtype, **extra)
    torch.manual_seed(0)
    moving = build(dlfast.optim, name, dtype, **extra)
    generator = torch.Generator().manual_seed(1)
    kept = []  # so that nothing new comes to lie where something was
    for _ in range(4):
        train(generator, [still, moving], 1)
        for entry in moving[1].state.values():
            for value in entry.values():
                kept.append(value.detach())
                if how == "swap":
                    torch.utils.swap_tensors(value, value.clone())
                elif how == "data":
                    value.data = value.data.clone()
                else:
                    value.share_memory_()
    for (p, entry), (q, other) in zip(moving[1].state.items(), still[1].state.items(), strict=True):
        assert torch.equal(p, q)
        assert entry.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in entry.items())
    assert ran_natively(moving[1])


@needs_native
def test_a_state_of_another_shape_over_the_same_memory_is_refused():
    p = nn.Parameter(torch.ones(4, 3))
    opt = dlfast.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(4, 3)
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    buffer.data = buffer.data.view(12)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"momentum_buffer of .* has shape \(12,\)"):
        opt.step()
    assert torch.equal(p, before)


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_trained_in_another_dtype_counts_when_masters_come_back(dtype, fused, converts_by):
    p = nn.ParameterList([torch.ones(3, dtype=dtype)])
    opt = dlfast.optim.SGD(p.parameters(), lr=1.0, master_weights=True, fused=fused)
    for to, expected in ((dtype, 0.0), (torch.float32, -1.0), (dtype, -2.0)):
        p.to(to)
        p[0].grad = torch.ones(3, dtype=to)
        opt.step()
        assert torch.equal(p[0].detach().float(), torch.full((3,), expected))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_compiled_step_after_a_conversion(name, converts_by):
    torch._dynamo.reset()
    model, opt = build(dlfast.optim, name, torch.float32)
    other = copy.deepcopy((model, opt))
    step = torch.compile(lambda: opt.step(), backend="aot_eager")
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64, torch.float32):
        for m in (model, other[0]):
            for p in m.parameters():
                p.data = p.data.to(dtype)
                p.grad = None
        for _ in range(2):
            set_grads(generator, list(model.parameters()), list(other[0].parameters()))
            step()
            other[1].step()
    assert_same(model.parameters(), other[0].parameters(), 1e-6)
    torch._dynamo.reset()
