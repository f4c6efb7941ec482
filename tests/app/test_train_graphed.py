"""Training in whole steps: Lightning's manual optimisation comes to what its own does."""

from __future__ import annotations

import pytest
import torch

import dlfast.app.train
from dlfast.app.lightning import Training
from dlfast.app.settings import make_optimizer, new_settings
from dlfast.app.train import fit
from tests.support.program import assert_same_run, history, small


@pytest.fixture
def whole_steps(monkeypatch):
    """On the CPU, where they run without a graph; which steps were taken so."""
    taken = []
    original = Training._whole_step
    monkeypatch.setattr(Training, "_whole_step", lambda self, batch: (taken.append(None), original(self, batch))[1])
    monkeypatch.setattr(dlfast.app.train, "_can_be_graphed", lambda settings, device: True)
    return taken


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_same_run_as_with_steps_of_lightning(whole_steps, tmp_path, backend):
    expected = fit(small(tmp_path / "plain", backend=backend, cuda_graph=False))
    assert not whole_steps
    result = fit(small(tmp_path / "whole", backend=backend))
    assert len(whole_steps) == len(result.step_losses) == 60
    assert_same_run(tmp_path / "whole", tmp_path / "plain")
    assert history(result) == history(expected)
    assert result.step_losses == expected.step_losses
    checkpoints = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "plain")]
    assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] == 60


def test_a_run_goes_on_with_other_steps(whole_steps, tmp_path):
    fit(small(tmp_path / "expected", cuda_graph=False))
    out = tmp_path / "out"
    fit(small(out, epochs=1))
    fit(small(out, epochs=2, resume=True, cuda_graph=False))
    fit(small(out, epochs=3, resume=True))
    assert len(whole_steps) == 40
    assert_same_run(out, tmp_path / "expected")


def test_a_refusal_says_how_to_do_without(whole_steps, monkeypatch, tmp_path):
    def refuse(*args):
        raise RuntimeError("no graph of this")

    monkeypatch.setattr("dlfast.app.lightning.graphed_step", refuse)
    with pytest.raises(RuntimeError, match=r"no graph of this \(with --no-cuda-graph"):
        fit(small(tmp_path / "out"))


@pytest.mark.parametrize(
    ("backend", "device", "has_code", "expected"),
    [
        ("fused", "cuda", True, True),
        ("fused", "cuda", False, False),  # its steps are plain PyTorch there
        ("torch", "cuda", False, True),
        ("fused", "cpu", True, False),
    ],
)
def test_where_steps_are_graphs(monkeypatch, backend, device, has_code, expected):
    monkeypatch.setattr(dlfast.app.train, "runs_on", lambda asked: has_code)
    assert dlfast.app.train._can_be_graphed(new_settings(small(backend=backend)), device) is expected


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_where_steps_are_counted_is_no_matter_of_the_checkpoint(optimizer):
    """Else PyTorch's Adam could not go on with a run that began on a GPU, or there with one that did not."""
    settings = new_settings(small(optimizer=optimizer, backend="torch"))
    saved, loaded = (make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1))]) for _ in range(2))
    state = saved.state_dict()
    state["param_groups"][0]["capturable"] = True
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["capturable"] is False
    assert state["param_groups"][0]["capturable"] is True
