"""Normalisations folded into convolutions: kept while they are true, and not a call longer."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

import dlfast
from dlfast._native import native
from dlfast.nn.folding import Fold
from tests.fusion.helpers import runs_fused
from tests.support.native import needs_native


@needs_native
def test_folding_follows_every_change():
    torch.manual_seed(0)
    layer = dlfast.nn.ConvBNReLUPool2d(3, 8, 3, pool=None, activation=None)
    layer(torch.randn(4, 3, 10, 10))
    layer.eval()
    x = torch.randn(2, 3, 10, 10)

    def agrees():
        with torch.no_grad():
            z = nn.functional.conv2d(x, layer.weight, layer.bias)
            want = nn.functional.batch_norm(
                z, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias, eps=layer.bn.eps
            )
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)

    agrees()
    kept = layer._fold()._kept
    agrees()
    assert layer._fold()._kept is kept  # not folded again
    with torch.no_grad():
        layer.weight.mul_(2)
    agrees()
    layer.weight.data.add_(0.5)  # counts no version
    agrees()
    layer.bn.running_mean.add_(1)
    agrees()
    layer.bn.weight.data.mul_(-1)
    agrees()
    layer.bn.eps = 0.1
    agrees()
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
    agrees()
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    agrees()
    layer.double()
    x = x.double()
    agrees()


def test_folding_leaves_gradients_alone():
    layer = dlfast.nn.ConvBNReLUPool2d(3, 8, 3).eval()
    layer(torch.randn(2, 3, 10, 10)).sum().backward()
    assert layer.bn.weight.grad is not None
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    x = torch.randn(2, 3, 10, 10, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()  # what inference mode folded must not stand in the way
    assert x.grad is not None


def test_another_normalisation_in_place_of_the_child_runs():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(dlfast.nn.ConvBNReLUPool2d(3, 4, 1)).eval()
    assert type(layer.bn) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 4, 4)
    want = layer(x)
    layer.bn.register_forward_hook(lambda module, args, output: output + 1)
    z = nn.functional.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(want, nn.functional.max_pool2d(z / math.sqrt(1 + 1e-5), 2).relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), nn.functional.max_pool2d(z / math.sqrt(1 + 1e-5) + 1, 2).relu())


@needs_native
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (48, 1, 5, 5), (8, 3, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_state_of_a_weight_sees_every_tap(shape, memory_format):
    weight = nn.Parameter(torch.randn(shape).contiguous(memory_format=memory_format))
    state = native.module.TensorsState([weight])
    before = weight.detach().clone()
    for tap in range(shape[2] * shape[3]):
        weight.data[:, :, tap // shape[3], tap % shape[3]] += 1  # counts no version
        assert not state.holds([weight])
        weight.data.copy_(before)
        assert state.holds([weight])


@needs_native
def test_the_state_of_tensors_sees_every_number_of_small_ones():
    vector, gaps = torch.randn(1000), torch.randn(4, 3, 4, 4)[:, :, ::2, ::2]
    weight = torch.randn(64, 16, 4, 4)  # 64 KiB: the largest that is compared whole
    for tensor in (vector, vector.double(), vector.bfloat16(), gaps, weight):
        before = native.module.TensorsState([vector, tensor])
        for place in range(0, tensor.numel(), 1 + tensor.numel() // 1000):
            old = tensor.flatten()[place].clone()
            index = torch.unravel_index(torch.tensor(place), tensor.shape)
            tensor.data[index] = math.nan
            assert not before.holds([vector, tensor])
            tensor.data[index] = old
        assert before.holds([vector, tensor])


@needs_native
def test_the_state_of_tensors_is_of_these_tensors_and_no_others():
    vector, matrix = torch.randn(1000), torch.randn(4, 4)
    state = native.module.TensorsState([vector, matrix])
    assert state.holds([vector, matrix])
    for others in ([vector], [matrix, vector], [vector.clone(), matrix], [vector, matrix.t()], [vector, matrix.data]):
        assert not state.holds(others)  # .data: the same memory, but writes to it are counted elsewhere
    vector.add_(0)
    assert not state.holds([vector, matrix])
    state = native.module.TensorsState([matrix])
    del matrix
    anew = [torch.zeros(4, 4) for _ in range(50)]
    assert not any(state.holds([tensor]) for tensor in anew)  # one of them may be where the first was


@needs_native
def test_what_counts_no_versions_has_no_state():
    with torch.inference_mode():
        made = torch.randn(3)
    for tensor in (made, torch.randn(3, 3).to_sparse()):
        with pytest.raises(RuntimeError, match="cannot be kept"):
            native.module.TensorsState([tensor])


@needs_native
def test_elsewhere_than_on_the_cpu_no_values_are_looked_at():
    """They would be waited for; the meta device, which has none, stands for those."""
    layer = dlfast.nn.ConvBNReLUPool2d(3, 8, 3).eval().to("meta")
    with torch.no_grad():
        first = layer._fold().tensors(layer, layer.bn)
        assert layer._fold().tensors(layer, layer.bn)[0] is first[0]
        layer.bn.running_mean.add_(1)
        second = layer._fold().tensors(layer, layer.bn)
        assert second[0] is not first[0]
        layer.eval()  # after a change through .data
        assert layer._fold().tensors(layer, layer.bn)[0] is not second[0]


@needs_native
@pytest.mark.cuda
def test_on_cuda_a_tensor_made_anew_is_another():
    layer = dlfast.nn.ConvBNReLUPool2d(3, 8, 3, pool=None, activation=None).eval().cuda()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        for number in range(5):
            weight = torch.full((8, 3, 3, 3), float(number), device="cuda")
            have = torch.func.functional_call(layer, {"weight": weight}, (x,))
            z = nn.functional.conv2d(x, weight, layer.bias)
            torch.testing.assert_close(have, z / math.sqrt(1 + 1e-5), rtol=1e-3, atol=1e-3)
            del weight


# ---- In fused models ------------------------------------------------------------------------------------------


def folded_model():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    return dlfast.fuse(plain), plain, torch.randn(2, 8, 8, 8)


@needs_native
@pytest.mark.filterwarnings("ignore::dlfast.NotFusedWarning")
def test_a_weight_that_is_made_anew_at_every_call():
    """It lands where the last one was: an address proves nothing."""
    fused, plain, x = folded_model()
    for number in range(40):
        mask = torch.ones(8, 8, 3, 3)
        mask.view(-1)[number * 13] = 0
        with torch.no_grad():
            for model in (fused, plain):
                prune.custom_from_mask(model[0], "weight", mask)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


@needs_native
def test_weights_given_for_one_call():
    fused, plain, x = folded_model()
    assert runs_fused(fused, x)
    with torch.no_grad():
        for number in range(40):
            weight = plain[0].weight.clone()
            weight.view(-1)[number * 13] += 1
            given = {"0.weight": weight}
            have, want = (torch.func.functional_call(model, given, (x,)) for model in (fused, plain))
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
            del weight, given


@needs_native
def test_a_fold_is_kept_while_it_is_true_and_no_longer():
    _, plain, _ = folded_model()
    conv, bn = plain[0], plain[1]
    fold = Fold()
    with torch.no_grad():
        kept = fold.tensors(conv, bn)
        assert fold.tensors(conv, bn)[0] is kept[0]
        same = copy.deepcopy(conv)
        assert fold.tensors(same, bn)[0] is not kept[0]  # equal in all numbers, but another tensor
        kept = fold.tensors(conv, bn)
        conv.weight.data = conv.weight.data.clone()
        assert fold.tensors(conv, bn)[0] is not kept[0]


@needs_native
def test_a_fold_does_not_hold_what_it_is_made_of():
    """Neither against being freed nor against being swapped."""
    conv, bn, fold = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), Fold()
    with torch.no_grad():
        fold.tensors(conv, bn)
    other = nn.Parameter(torch.randn_like(conv.weight))
    torch.utils.swap_tensors(conv.weight, other)
    gone = weakref.ref(conv.weight)
    with torch.no_grad():
        torch.testing.assert_close(fold.tensors(conv, bn), Fold().tensors(conv, bn))
    del other
    conv.weight = None
    assert gone() is None


@needs_native
def test_nothing_that_a_mode_makes_is_kept():
    fused, plain, x = folded_model()
    (chain,) = fused.forward.chains
    with torch.no_grad():
        graph = make_fx(fused)(x)
        assert chain.fold._kept is None
        fused[0].weight.mul_(2)
        torch.testing.assert_close(graph(x), plain(x), rtol=1e-4, atol=1e-5)  # the graph follows the weights
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fused(mode.from_tensor(x))
        assert chain.fold._kept is None
    with torch.inference_mode():
        fused(x)
    assert not any(t.is_inference() for t in chain.fold._kept)
