"""The five networks of `dlfast.models` learn as those of their articles, written out here layer by layer."""

import pytest
import torch
from torch import nn

from dlfast.app.settings import TrainConfig, make_optimizer, new_settings
from dlfast.models import build


def twoconv():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(65536, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def convpool():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 9, 10),
    )  # fmt: skip


def mnistnet():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def stacked():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(),
        nn.Linear(128, 10), nn.LogSoftmax(dim=1),
    )  # fmt: skip


def lenet():
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def sgd_with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


# Images of the article's size, but for convpool: its 289x289 take seconds a step.
ARTICLES = {
    "twoconv": (twoconv, nn.CrossEntropyLoss(), sgd, (1, 3, 32, 32)),
    "convpool": (convpool, nn.CrossEntropyLoss(), sgd, (2, 1, 33, 37)),
    "mnistnet": (mnistnet, nn.CrossEntropyLoss(), adam, (4, 1, 28, 28)),
    "stacked": (stacked, nn.NLLLoss(), adam, (4, 1, 28, 28)),
    "lenet": (lenet, nn.CrossEntropyLoss(), sgd_with_momentum, (4, 3, 32, 32)),
}
STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The steps are too small for two, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses_of(model, loss, optimizer, batches):
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        value = loss(model(images), labels)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", list(ARTICLES))
def test_losses_are_those_of_the_article(name):
    """Over 20 steps in float64, to 1e-11 of the loss: no sum here rounds by more.

    The longest, of 65536 products in twoconv's first linear layer, rounds by at most 65536 * 2**-53 = 7e-12 of
    its terms' sizes. Roundings cancel, so that measured losses differ by 2e-16. A layer that is missing, or
    another step size, shows in one of the first four digits.
    """
    write_out, loss, article_optimizer, shape = ARTICLES[name]
    torch.manual_seed(3)
    weights = list(write_out().double().state_dict().values())
    batches = [(torch.randn(shape, dtype=torch.float64), torch.randint(10, shape[:1])) for _ in range(STEPS)]

    article = write_out().double()
    article.load_state_dict(dict(zip(article.state_dict(), weights, strict=True)))
    expected = losses_of(article, loss, article_optimizer(article.parameters()), batches)
    for fused, backend in ((False, "torch"), (True, "fused")):
        ours = build(name, input_size=shape[2:], fused=fused).double()
        ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
        optimizer = make_optimizer(new_settings(TrainConfig(name, backend=backend)), ours.parameters())
        torch.testing.assert_close(losses_of(ours, ours.loss, optimizer, batches), expected, rtol=1e-11, atol=0)
