"""A graphed step of each of the five networks is the plain one, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import dlfast
from dlfast.models import NETWORKS, build
from tests.graphed.cases import assert_equal, everything
from tests.support.native import CUDA_KERNELS

pytestmark = [*CUDA_KERNELS, pytest.mark.usefixtures("graphs")]

OPTIMIZERS = {"sgd": dlfast.optim.SGD, "adam": dlfast.optim.Adam, "adamw": dlfast.optim.AdamW}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network(name):
    network = NETWORKS[name]
    size = min(network.input_size, 33)  # convpool's images are large for the emulator
    torch.manual_seed(1)
    model = build(name, input_size=size).cuda()
    loss_fn = F.nll_loss if network.log_softmax else F.cross_entropy
    data = [
        (torch.randn(2, network.in_channels, size, size, device="cuda"), torch.randint(10, (2,), device="cuda"))
        for _ in range(2)
    ]
    other = copy.deepcopy(model)
    optimizer, other_optimizer = (
        OPTIMIZERS[network.optimizer](each.parameters(), lr=network.lr) for each in (model, other)
    )
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    step = dlfast.graphed_step(model, loss_fn, optimizer, data[0])
    assert step.is_graphed
    losses = [step(*batch) for batch in data]
    torch.manual_seed(5)
    for batch, loss in zip(data, losses, strict=True):
        other_optimizer.zero_grad()
        expected = loss_fn(other(batch[0]), batch[1])
        expected.backward()
        other_optimizer.step()
        assert torch.equal(loss, expected)
    assert_equal(everything(model, optimizer), everything(other, other_optimizer))
    assert all(not torch.equal(t, model.state_dict()[key]) for key, t in before.items())
