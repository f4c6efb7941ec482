"""CUDA graphs for the emulator, which has none: what a capture runs is written down, and a replay calls it again.

It keeps a graph's promises to Python: a replay reads and writes the very tensors that were captured, calls no code of
the model, counts no versions, and draws new random numbers. Of memory that is freed and used again, of streams and of
errors of capture it knows nothing: those a real GPU has to show.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dlfast._native import native
from dlfast.optim._step import FusedStep


class RecordedGraph:
    def __init__(self):
        self.calls = []

    def replay(self):
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                call()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        kept = [t for t in _pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]

        def again():
            new = func(*args, **kwargs)
            for own, t in zip(kept, (t for t in _pytree.tree_leaves(new) if isinstance(t, torch.Tensor)), strict=True):
                if own.untyped_storage().data_ptr() != t.untyped_storage().data_ptr():
                    own.copy_(t)

        self.graph.calls.append(again)
        return output


def use_recorded_graphs(monkeypatch):
    """Let ``torch.cuda`` capture into a :class:`RecordedGraph`, on an emulated device."""
    recording = []
    run, launch = native.module.run_cuda, FusedStep._launch
    own_params = []

    def launch_of(self, *args):
        own_params[:] = [p for group in self.param_groups for p in group["params"]]
        return launch(self, *args)

    def run_cuda(steps, grads, memories, state, *others):
        done = run(steps, grads, memories, state, *others)
        if recording and done:
            entries = dict(state)
            own = {p: p.grad for p in own_params}

            def again():
                found = {p: p.grad for p in own}
                for p, grad in own.items():
                    p.grad = grad
                assert run(steps, grads, memories, entries, *others)
                for p, grad in found.items():
                    p.grad = grad

            recording[-1].calls.append(again)
        return done

    @contextmanager
    def capture(graph, pool=None, stream=None, capture_error_mode="global"):
        recording.append(graph)
        try:
            with torch.cuda.stream(stream), _Recorder(graph):
                yield
        finally:
            recording.pop()

    monkeypatch.setattr(native.module, "run_cuda", run_cuda)
    monkeypatch.setattr(FusedStep, "_launch", launch_of)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(recording))
