import pytest
import torch

from tests.support.recorded_graph import use_recorded_graphs


@pytest.fixture
def graphs(monkeypatch):
    """Real graphs on a GPU, where they must give the bits of a step without; recorded ones on the emulator."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if "emulator" in torch.cuda.get_device_name():
        use_recorded_graphs(monkeypatch)
