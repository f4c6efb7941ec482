"""The five networks: fused and plain are one network, and their sizes follow from the input."""

import pytest
import torch

from dlfast import models
from dlfast.models import NETWORKS, build

NAMES = tuple(NETWORKS)
SIZES = {
    "twoconv": (9, 8),
    "convpool": (21, 16),
    "mnistnet": (12, 13),
    "stacked": (11, 12),
    "lenet": (17, 20),
}
SMALLEST = {"twoconv": 1, "convpool": 4, "mnistnet": 4, "stacked": 6, "lenet": 16}


def both(name, **options):
    networks = []
    for fused in (True, False):
        torch.manual_seed(7)
        networks.append(build(name, fused=fused, **options))
    return networks


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_plain_are_initialised_alike(name):
    fused, plain = both(name, input_size=SIZES[name])
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(fused.state_dict()) == list(plain.state_dict())
    for key, value in fused.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
    plain.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_in_forward_order(name):
    names = [n for n, _ in build(name, input_size=SIZES[name]).named_parameters()]
    layers = [f"conv{i + 1}" for i in range(2)] + [f"fc{i + 1}" for i in range(len(names) // 2 - 2)]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_plain_compute_the_same(name):
    fused, plain = both(name, input_size=SIZES[name], num_classes=7)
    x = torch.randn(5, NETWORKS[name].in_channels, *SIZES[name])
    target = torch.tensor([0, 1, 2, 3, 6])
    outputs = [network(x) for network in (fused, plain)]
    assert outputs[0].shape == (5, 7)
    # Sums of up to 64 * 9 products in float32, in another order.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for network, output in zip((fused, plain), outputs, strict=True):
        network.loss(output, target).backward()
    for (key, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_plain_networks_hold_nothing_of_ours():
    for name in NAMES:
        network = build(name, input_size=SIZES[name], fused=False)
        assert {type(m) for m in network.modules()} <= {type(network), torch.nn.Conv2d, torch.nn.Linear}


def test_layers_at_the_sizes_of_the_articles():
    """(out, in, kernel) of each convolution and (out, in) of each linear layer."""
    expected = {
        "twoconv": [(64, 3, 3, 3), (64, 64, 3, 3), (256, 64 * 32 * 32), (10, 256)],
        "convpool": [(32, 1, 3, 3), (64, 32, 3, 3), (10, 64 * 72 * 72)],
        "mnistnet": [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64 * 7 * 7), (10, 128)],
        "stacked": [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64 * 12 * 12), (10, 128)],
        "lenet": [(6, 3, 5, 5), (16, 6, 5, 5), (120, 16 * 5 * 5), (84, 120), (10, 84)],
    }
    for name in NAMES:
        with torch.device("meta"):
            network = getattr(models, name)()
        assert [tuple(p.shape) for p in network.parameters() if p.dim() > 1] == expected[name]


def relu_after_last_conv(network, x):
    """Whether a negative value can reach the first linear layer."""
    seen = []
    network.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(x)
    return bool((seen[0] >= 0).all())


@pytest.mark.parametrize("fused", [True, False])
def test_activations_are_those_of_the_articles(fused):
    for name in NAMES:
        torch.manual_seed(0)
        network = build(name, input_size=SIZES[name], fused=fused)
        x = torch.randn(4, NETWORKS[name].in_channels, *SIZES[name])
        assert relu_after_last_conv(network, x) == (name != "convpool")
    log_probabilities = build("stacked", fused=fused)(torch.randn(3, 1, 28, 28))
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(3))


def test_loss_of_stacked_is_that_of_its_logits():
    network = build("stacked", input_size=8)
    logits, target = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    got = network.loss(logits.log_softmax(1), target)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, target))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fused", [True, False])
def test_smallest_input(name, fused):
    size, channels = SMALLEST[name], NETWORKS[name].in_channels
    network = build(name, input_size=(size, size + 1), fused=fused)
    assert network(torch.randn(1, channels, size, size + 1)).shape == (1, 10)
    for bad in (size - 1, (size, size - 1), (size - 1, size)):
        with pytest.raises(ValueError, match="input_size"):
            build(name, input_size=bad, fused=fused)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 2.5}, "num_classes"),
        ({"in_channels": -1}, "in_channels"),
        ({"input_size": 0}, "input_size"),
        ({"input_size": (28, 28, 28)}, "input_size"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        models.mnistnet(**options)


def test_unknown_network_lists_the_known():
    with pytest.raises(ValueError, match=r"'resnet'.*twoconv, convpool, mnistnet, stacked, lenet"):
        build("resnet")


def test_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(N, C, 28, 28\)"):
        models.mnistnet()(torch.randn(1, 1, 28, 27))
