"""Training on a GPU comes to the same with CUDA graphs and without."""

from __future__ import annotations

import pytest
import torch

from dlfast.app.lightning import Training
from dlfast.app.train import fit
from tests.support.native import CUDA_KERNELS
from tests.support.program import assert_same_run, small
from tests.support.recorded_graph import use_recorded_graphs

pytestmark = CUDA_KERNELS


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_same_run_as_without_graphs(monkeypatch, tmp_path, backend):
    if "emulator" in torch.cuda.get_device_name():
        use_recorded_graphs(monkeypatch)
    graphed = []
    original = Training._whole_step
    monkeypatch.setattr(Training, "_whole_step", lambda self, batch: (graphed.append(None), original(self, batch))[1])
    options = {"epochs": 2, "device": "cuda", "backend": backend, "batch_size": 256}
    expected = fit(small(tmp_path / "plain", cuda_graph=False, **options))
    assert not graphed
    out = tmp_path / "graphed"
    fit(small(out, **options | {"epochs": 1}))
    result = fit(small(out, resume=True, **options))
    assert len(graphed) == 2 * len(result.step_losses) == len(expected.step_losses)
    assert_same_run(out, tmp_path / "plain")
