"""Run by test_distributed.py in two gloo processes: ``python distributed_program.py RANK FILE CASE``."""

import copy
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dlfast.optim

WORLD = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.ReLU(), nn.Linear(33, 7), nn.ReLU(), nn.Linear(7, 1))


def batches(rank):
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 6, generator=generator)
        yield x[rank * 4 : rank * 4 + 4], x


def loss_of(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def alone(make, rank):
    """The same steps of the same model in one process, with all the data and PyTorch's own functions."""
    model = network()
    opt, max_norm = make(model.parameters())
    norms = []
    for _, x in batches(rank):
        opt.zero_grad()
        loss_of(model, x).backward()
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        opt.step()
    return [p.detach() for p in model.parameters()], norms


def check(mine, expected):
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def ddp(rank):
    model = nn.parallel.DistributedDataParallel(network())
    opt = dlfast.optim.AdamW(model.parameters(), lr=0.01, max_grad_norm=0.5, zero_grad_after_step=True)
    expected, norms = alone(lambda ps: (torch.optim.AdamW(ps, lr=0.01), 0.5), rank)
    for (x, _), norm in zip(batches(rank), norms, strict=True):
        loss_of(model, x).backward()
        opt.step()
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-4, atol=0)
    check(model.parameters(), expected)


def zero(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(network())
    opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=dlfast.optim.Adam, lr=0.01)
    expected, _ = alone(lambda ps: (torch.optim.Adam(ps, lr=0.01), None), rank)
    for x, _ in batches(rank):
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()
    check(model.parameters(), expected)
    opt.consolidate_state_dict(0)
    if rank == 0:
        assert len(opt.state_dict()["state"]) == 6


def zero_norm(rank):
    """Each process holds a part of the parameters; the norm is that of all, and an infinity anywhere skips the
    step everywhere."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for name in ("AdamW", "SGD"):
        model = nn.parallel.DistributedDataParallel(network())
        make = {"optimizer_class": getattr(dlfast.optim, name), "lr": 0.01}
        opt = ZeroRedundancyOptimizer(model.parameters(), **make, max_grad_norm=0.5)
        plain = ZeroRedundancyOptimizer(model.parameters(), **make, max_grad_norm=0.5, fused=False)
        expected, norms = alone(lambda ps, name=name: (getattr(torch.optim, name)(ps, lr=0.01), 0.5), rank)
        for (x, _), norm in zip(batches(rank), norms, strict=True):
            opt.zero_grad()
            loss_of(model, x).backward()
            opt.step()
            torch.testing.assert_close(opt.optim.grad_norm, norm, rtol=1e-4, atol=0)
        check(model.parameters(), expected)
        copies_measure_all(opt, rank)
        before = [p.detach().clone() for p in model.parameters()]
        for o in (opt, plain):
            o.optim.grad_scale = torch.tensor(2.0)
            held = o.optim.param_groups[0]["params"]
            kept = held[0].grad.clone()
            if rank == 1:
                held[0].grad[0] = float("inf")
            o.step()
            assert o.optim.step_was_skipped
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            held[0].grad.copy_(kept)
        plain.step()
        assert not plain.optim.step_was_skipped
        torch.testing.assert_close(plain.optim.grad_norm, norms[-1] / 2, rtol=1e-4, atol=0)

    # A process without parameters takes part in the norm.
    lonely = nn.Parameter(torch.ones(3))
    opt = ZeroRedundancyOptimizer([lonely], optimizer_class=dlfast.optim.SGD, lr=1.0, max_grad_norm=1.0)
    lonely.grad = torch.full((3,), 2.0)
    opt.step()
    torch.testing.assert_close(lonely.detach(), torch.full((3,), 1 - 3**-0.5))
    torch.testing.assert_close(opt.optim.grad_norm, torch.tensor(12.0).sqrt())
    with pytest.raises(RuntimeError, match="zero_grad_after_step"):
        ZeroRedundancyOptimizer([lonely], optimizer_class=dlfast.optim.SGD, lr=1.0, zero_grad_after_step=True)
    with pytest.raises(RuntimeError, match="zero_grad_after_step"):
        opt.optim.zero_grad_after_step = True


def in_backward(rank):
    """DDP reduces gradients after a step in backward would have used them; FSDP2 has reduced them before."""
    for wrapped_first in (True, False):
        inner = network()
        opt = dlfast.optim.SGD(inner.parameters(), lr=0.1)
        before = [p.detach().clone() for p in inner.parameters()]
        x = next(batches(rank))[0]
        if wrapped_first:
            model = nn.parallel.DistributedDataParallel(inner)
            with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*call step"):
                dlfast.optim.step_in_backward(opt)
            loss_of(model, x).backward()
            assert all(p.grad is not None for p in inner.parameters())  # no hook was left behind
        else:
            handle = dlfast.optim.step_in_backward(opt)
            model = nn.parallel.DistributedDataParallel(inner)
            with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*call step"):
                loss_of(model, x).backward()
            handle.remove()
        assert all(torch.equal(p, q) for p, q in zip(inner.parameters(), before, strict=True))

    # What DDP is told to leave alone is each process's own, as is a model beside it.
    inner, own = network(), network()
    ignored = [f"0.{name}" for name, _ in inner[0].named_parameters()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ignored)
    model = nn.parallel.DistributedDataParallel(inner)
    with dlfast.optim.step_in_backward(dlfast.optim.SGD([*inner[0].parameters(), *own.parameters()], lr=0.1)):
        (loss_of(model, x) + loss_of(own, x)).backward()
    assert inner[0].weight.grad is None
    assert inner[2].weight.grad is not None

    model = sharded(network())
    opt = dlfast.optim.SGD(model.parameters(), lr=0.1)
    expected, _ = alone(lambda ps: (torch.optim.SGD(ps, lr=0.1), None), rank)
    with dlfast.optim.step_in_backward(opt):
        for x, _ in batches(rank):
            loss_of(model, x).backward()
    check([p.full_tensor() for p in model.parameters()], expected)


def copies_measure_all(opt, rank):
    """A copy of the local optimizer takes the norm over both processes, too, and says that it cannot be pickled."""
    held = opt.optim.param_groups[0]["params"]
    params, copied = copy.deepcopy((held, opt.optim))
    for p, q in zip(params, held, strict=True):
        p.grad = q.grad.clone()
    copied.step()
    torch.testing.assert_close(copied.grad_norm, opt.optim.grad_norm, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"save state_dict\(\)"):
        pickle.dumps(opt.optim)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank):
    model = sharded(network())
    options = {"lr": 0.01, "max_grad_norm": 0.5, "ema_decay": 0.5}
    opt = dlfast.optim.AdamW(model.parameters(), **options)
    expected, norms = alone(lambda ps: (torch.optim.AdamW(ps, lr=0.01), 0.5), rank)
    for (x, _), norm in zip(batches(rank), norms, strict=True):
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-4, atol=0)
    check([p.full_tensor() for p in model.parameters()], expected)
    first = next(iter(model.parameters()))
    assert isinstance(opt.state[first]["exp_avg"], type(first.data))  # a DTensor, as checkpoints want it
    before = [p.full_tensor().clone() for p in model.parameters()]
    with opt.swapped_ema():
        assert not torch.equal(first.full_tensor(), before[0])
    check([p.full_tensor() for p in model.parameters()], before)
    for refused in (dlfast.optim.LAMB(model.parameters()), dlfast.optim.Adam(model.parameters(), state_dtype="int8")):
        with pytest.raises(RuntimeError, match="DTensor"):
            refused.step()


def checkpoint(rank, folder):
    """A sharded run saved with torch.distributed.checkpoint goes on as the run that was not interrupted."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def steps(model, opt):
        for x, _ in batches(rank):
            opt.zero_grad()
            loss_of(model, x).backward()
            opt.step()

    def build():
        model = sharded(network())
        return model, dlfast.optim.AdamW(model.parameters(), lr=0.01, ema_decay=0.9, state_dtype=torch.bfloat16)

    model, opt = build()
    steps(model, opt)
    model_state, opt_state = get_state_dict(model, opt)
    dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=folder)
    other, other_opt = build()
    model_state, opt_state = get_state_dict(other, other_opt)
    state = {"model": model_state, "opt": opt_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(other, other_opt, model_state_dict=state["model"], optim_state_dict=state["opt"])
    steps(model, opt)
    steps(other, other_opt)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
        assert torch.equal(opt.state[a]["ema"].full_tensor(), other_opt.state[b]["ema"].full_tensor())


def main():
    rank, file, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    if case == "checkpoint":
        checkpoint(rank, file + ".checkpoint")
    else:
        {"ddp": ddp, "zero": zero, "zero_norm": zero_norm, "fsdp": fsdp, "in_backward": in_backward}[case](rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
