"""Under GradScaler, Lightning and accelerate an optimizer is one as any other, unless it is asked to unscale itself."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast._native import native
from tests.optim.cases import (
    OPTIONS,
    assert_same,
    by_name,
    by_torch_name,
    pair,
    ran_natively,
    tolerance,
)

engines = pytest.mark.parametrize("fused", [None, False, True], ids=["default", "plain", "fused"])
START = [torch.linspace(-1, 1, 37), torch.ones(5, 3)]
INFINITE = {0, 3}  # steps with a gradient that is


def handles_scale(opt):
    """As GradScaler and trainers ask."""
    return getattr(opt, "_step_supports_amp_scaling", False)


def backward(scaler, params, step):
    generator = torch.Generator().manual_seed(step)
    factor = math.inf if step in INFINITE else 1.0
    loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params) * factor
    scaler.scale(loss).backward()


def flows():
    def step(scaler, opt, params, i):
        backward(scaler, params, i)

    def clip_by_norm(scaler, opt, params, i):
        backward(scaler, params, i)
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(params, 0.5)

    def clip_by_value(scaler, opt, params, i):
        backward(scaler, params, i)
        scaler.unscale_(opt)
        nn.utils.clip_grad_value_(params, 0.3)

    def accumulate(scaler, opt, params, i):
        backward(scaler, params, i)
        backward(scaler, params, i + 100)

    def clip_every_other(scaler, opt, params, i):
        (clip_by_norm if i % 2 else step)(scaler, opt, params, i)

    return list(locals().values())


@by_torch_name
@engines
@pytest.mark.parametrize("flow", flows(), ids=lambda f: f.__name__)
def test_grad_scaler_steps_are_torchs(name, flow, fused):
    runs = pair(name, OPTIONS[name], START, fused=fused)
    for params, opt in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for i in range(6):
            opt.zero_grad()
            flow(scaler, opt, params, i)
            scaler.step(opt)
            scaler.update()
            if opt is runs[1][1]:
                assert opt.step_was_skipped is (i in INFINITE)
    (theirs, torch_opt), (mine, opt) = runs
    assert_same(mine, theirs, tolerance(torch.float32, 6))
    assert handles_scale(opt) is bool(fused)
    assert not handles_scale(torch_opt)
    # As unscaled and clipped as torch's: unless the step itself unscales.
    if not fused:
        assert_same([p.grad for p in mine], [p.grad for p in theirs], 1e-6)
    assert ran_natively(opt) is (fused is not False and native.module is not None)


@by_name
@engines
@pytest.mark.parametrize("unscales", [False, True], ids=["step", "unscale_"])
@pytest.mark.parametrize(
    "extra",
    [{"max_grad_norm": 0.5}, {"max_grad_value": 0.3}, {"zero_grad_after_step": True}],
    ids=lambda e: next(iter(e)),
)
def test_options_that_need_unscaled_gradients_have_them(name, extra, unscales, fused):
    params, other = ([nn.Parameter(t.clone()) for t in START] for _ in range(2))
    opt = getattr(dlfast.optim, name)(params, **OPTIONS[name], **extra, fused=fused)
    plain = getattr(dlfast.optim, name)(other, **OPTIONS[name], fused=False)
    assert handles_scale(opt)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for i in range(6):
        for scaler, o, ps in zip(scalers, (opt, plain), (params, other), strict=True):
            if o is plain or "zero_grad_after_step" not in extra:
                o.zero_grad()
            backward(scaler, ps, i)
            if unscales or o is plain:
                scaler.unscale_(o)
            if o is plain and "max_grad_norm" in extra:
                norm = nn.utils.clip_grad_norm_(ps, 0.5)
            elif o is plain and "max_grad_value" in extra:
                nn.utils.clip_grad_value_(ps, 0.3)
            scaler.step(o)
            scaler.update()
            assert o.step_was_skipped is (i in INFINITE)
        if "zero_grad_after_step" in extra:
            assert not any(p.grad.any() for p in params)
        if "max_grad_norm" in extra and i not in INFINITE:
            torch.testing.assert_close(opt.grad_norm, norm)
    assert_same(params, other, tolerance(torch.float32, 6))


def test_what_is_set_later_counts():
    p = nn.Parameter(torch.ones(3))
    opt = dlfast.optim.SGD([p], lr=0.1)
    assert not handles_scale(opt)
    opt.max_grad_norm = 1.0
    assert handles_scale(opt)
    assert handles_scale(copy.deepcopy(opt))
    opt.max_grad_norm = None
    assert not handles_scale(opt)
    opt._step_supports_amp_scaling = True  # as torch's constructors do, and users in need of the other
    assert handles_scale(opt)


def test_only_grad_scaler_tells_of_a_skipped_step_by_asking():
    p = nn.Parameter(torch.ones(3))
    opt = dlfast.optim.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    assert not handles_scale(opt)
    assert opt.step_was_skipped is False
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, skipped in ((math.inf, True), (1.0, False)):
        opt.zero_grad()
        scaler.scale(p.sum() * factor).backward()
        scaler.step(opt)
        scaler.update()
        assert opt.step_was_skipped is skipped


@by_torch_name
@engines
def test_a_scale_of_the_users_own_beside_that_of_grad_scaler(name, fused):
    """torch multiplies both where the step unscales; where it does not, each is taken off once as well."""
    runs = pair(name, OPTIONS[name], START, fused=fused)
    (theirs, torch_opt), (mine, opt) = runs
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for i in (1, 2):
        opt.grad_scale = torch.tensor(4.0)
        for params, o in runs:
            o.zero_grad()
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        torch_opt.step()
        for p in mine:
            p.grad.mul_(64)
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
        scaler.update()
    assert_same(mine, theirs, tolerance(torch.float32, 2))


def fit(pl, make, **trainer):
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 4)

        def configure_optimizers(self):
            self.made = make(self.parameters())
            return self.made

        def training_step(self, batch, index):
            return self.layer(batch[0]).square().mean()

    from pytorch_lightning.plugins.precision import MixedPrecision

    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**19))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.linspace(-1, 1, 24).view(8, 3)), 2)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(max_epochs=4, accelerator="cpu", plugins=[precision], **dict.fromkeys(quiet, False), **trainer).fit(
            model, data
        )
    return model


@pytest.mark.parametrize("clip", ["norm", "value", None])
@pytest.mark.parametrize("fused", [None, False], ids=["default", "plain"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_lightning_clips_as_for_torch(name, fused, clip):
    pl = pytest.importorskip("pytorch_lightning")
    trainer = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": clip} if clip else {}
    theirs = fit(pl, lambda params: getattr(torch.optim, name)(params, **OPTIONS[name]), **trainer)
    mine = fit(pl, lambda params: getattr(dlfast.optim, name)(params, **OPTIONS[name], fused=fused), **trainer)
    assert_same(mine.parameters(), theirs.parameters(), tolerance(torch.float32, 16))
    torch.manual_seed(0)
    assert not torch.equal(mine.layer.weight, nn.Linear(3, 4).weight)
    assert ran_natively(mine.made) is (fused is None and native.module is not None)


@pytest.mark.parametrize("options", [{"fused": True}, {"max_grad_norm": 1.0}], ids=str)
def test_lightning_refuses_to_clip_what_the_step_unscales(options):
    pl = pytest.importorskip("pytorch_lightning")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(pl, lambda params: dlfast.optim.SGD(params, lr=0.1, **options), gradient_clip_val=0.1)
    model = fit(pl, lambda params: dlfast.optim.SGD(params, lr=0.1, **options))
    assert model.made.step_was_skipped is False


@by_torch_name
@pytest.mark.parametrize("fused", [None, False], ids=["default", "plain"])
def test_accelerate_knows_of_skipped_steps(name, fused):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    runs = pair(name, OPTIONS[name], START, fused=fused)
    seen = []
    for params, opt in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        wrapped = accelerate.optimizer.AcceleratedOptimizer(accelerator.prepare(opt).optimizer, scaler=scaler)
        for i in range(6):
            wrapped.zero_grad()
            backward(scaler, params, i)
            wrapped.step()
            seen.append((opt, wrapped.step_was_skipped))
    (theirs, _), (mine, opt) = runs
    assert [s for o, s in seen if o is opt] == [s for o, s in seen if o is not opt] == [i in INFINITE for i in range(6)]
    assert_same(mine, theirs, tolerance(torch.float32, 6))
