"""Fused models and our layers in the hands of tools: tracers, quantisers, counters, differentiation of other kinds."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import types
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dlfast
from dlfast.fusion.layers import Link
from tests.fusion.helpers import example_of, layers, recorded, runs_fused, small_images
from tests.fusion.models import AWKWARD, Functional, Normalised, Plain, Residual
from tests.support.native import needs_native

pytestmark = needs_native


def pair(kind=Normalised):
    torch.manual_seed(0)
    plain = kind()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean is None or nn.init.normal_(module.running_mean)
    return dlfast.fuse(plain), plain


# ---- Tracers ------------------------------------------------------------------------------------------------


class EveryLayerALeaf(torch.fx.Tracer):
    def is_leaf_module(self, m, name):
        return True


@pytest.mark.parametrize("tracer", [torch.fx.Tracer, EveryLayerALeaf])
@pytest.mark.parametrize("kind", [Plain, Normalised, Functional, Residual])
def test_fx_traces_the_plain_layers(kind, tracer):
    fused, plain = pair(kind)
    x = example_of(plain)
    fused.eval(), plain.eval()
    graphs = [torch.fx.GraphModule(model, tracer().trace(model)) for model in (fused, plain)]
    assert graphs[0].code == graphs[1].code
    torch.testing.assert_close(graphs[0](x), plain(x), rtol=1e-4, atol=1e-5)
    assert runs_fused(fused, x)


def test_features_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    torch.manual_seed(0)
    plain = torchvision.models.resnet18().eval()
    fused, x = dlfast.fuse(plain), torch.randn(1, 3, 64, 64)
    assert get_graph_node_names(fused) == get_graph_node_names(plain)
    nodes = ["relu", "layer1.0.bn2", "flatten"]
    have, want = (create_feature_extractor(model, nodes)(x) for model in (fused, plain))
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


def test_features_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", features_only=True).eval()
    fused, x = dlfast.fuse(plain), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)
    model = timm.create_model("resnet10t").eval()
    fused = dlfast.fuse(model)
    torch.testing.assert_close(fused.forward_intermediates(x), model.forward_intermediates(x), rtol=1e-3, atol=1e-4)


OURS = {
    "conv": lambda: dlfast.nn.ConvReLUPool2d(3, 4, 3),
    "conv bn": lambda: dlfast.nn.ConvBNReLUPool2d(3, 4, 3),
    "bn": lambda: dlfast.nn.BNReLUPool2d(3),
    "relu": lambda: dlfast.nn.ReLUPool2d(),
}


@pytest.mark.parametrize("what", OURS)
def test_our_layers_are_leaves(what):
    model = nn.Sequential(OURS[what](), nn.Flatten()).double().eval()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(graph(small_images()), model(small_images()))


@pytest.mark.parametrize("what", ["conv", "relu"])
def test_our_layers_traced_by_themselves_are_functions(what):
    layer = OURS[what]().double()
    graph = torch.fx.symbolic_trace(layer)
    assert [node.op for node in graph.graph.nodes if node.op.startswith("call")] == ["call_function"]
    torch.testing.assert_close(graph(small_images()), layer(small_images()))


def test_script_is_refused_with_what_to_do():
    with pytest.raises(AttributeError, match=r"script dlfast\.unfuse\(model\)"):
        torch.jit.script(dlfast.fuse(layers()))


def test_a_trace_holds_operators_of_pytorch_alone():
    fused, plain = pair()
    fused.eval()
    traced = torch.jit.trace(fused, (example_of(plain),))
    assert "dlfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(example_of(plain)), plain.eval()(example_of(plain)), rtol=1e-4, atol=1e-5)


# ---- Who else folds or quantises ----------------------------------------------------------------------------


def test_what_others_fold_is_folded_once():
    from torch.fx.experimental.optimization import fuse as fold_by_fx

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain(torch.randn(8, 3, 12, 12) * 3)
    plain.eval()
    fused, x = dlfast.fuse(plain), small_images().float()
    torch.testing.assert_close(fuse_conv_bn_eval(fused[0], fused[1])(x), fuse_conv_bn_eval(plain[0], plain[1])(x))
    torch.testing.assert_close(fold_by_fx(fused)(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["dynamic", "static", "qat", "fx"])
def test_quantisation_of_a_fused_model(how):
    import torch.ao.quantization as quantization
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    def quantised(model):
        model = model.eval()
        if how == "dynamic":
            return quantization.quantize_dynamic(model, {nn.Linear})
        qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
        if how == "fx":
            prepared = prepare_fx(model, quantization.QConfigMapping().set_global(qconfig), (x,))
            prepared(x)
            return convert_fx(prepared)
        wrapped = quantization.QuantWrapper(model)
        wrapped.qconfig = qconfig
        if how == "qat":
            wrapped.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
            prepared = quantization.prepare_qat(wrapped.train())
        else:
            quantization.fuse_modules(wrapped, [["module.0", "module.1", "module.2"]], inplace=True)
            prepared = quantization.prepare(wrapped)
        prepared(x)
        return quantization.convert(prepared.eval())

    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3)
    )
    x = small_images().float()
    fused = dlfast.fuse(copy.deepcopy(plain), inplace=True)
    torch.testing.assert_close(quantised(fused)(x), quantised(plain)(x))


@pytest.mark.filterwarnings("ignore")
def test_quantisation_beside_our_layers():
    model = nn.Sequential(*[make() for make in (OURS["bn"], OURS["conv bn"])], nn.Flatten(), nn.LazyLinear(3)).eval()
    x = small_images().float()
    want = model(x)
    have = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x)
    torch.testing.assert_close(have, want, rtol=0.1, atol=0.1)
    layer = dlfast.nn.BNReLUPool2d(3)
    assert not hasattr(layer, "qconfig")
    layer.qconfig = "mine"
    assert layer.qconfig == "mine"
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


# ---- Differentiation, counters, trackers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plain, Normalised, Functional])
def test_forward_mode(kind):
    fused, plain = pair(kind)
    fused, plain = fused.double().eval(), plain.double().eval()
    x = example_of(plain).double()
    tangents = []
    for model in (fused, plain):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
    torch.testing.assert_close(*tangents)
    assert runs_fused(fused, x)


@pytest.mark.parametrize("what", OURS)
def test_forward_mode_of_our_layers(what):
    layer = OURS[what]().double().eval()
    x = small_images()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1])


@pytest.mark.parametrize("groups", [1, 2])
def test_floating_point_operations_are_counted(groups):
    from torch.utils.flop_counter import FlopCounterMode

    ours = dlfast.nn.ConvReLUPool2d(4, 8, 3, groups=groups, stride=2, padding=1)
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    fused = dlfast.fuse(plain)
    x, counts = torch.randn(2, 4, 12, 12, requires_grad=True), []
    for model in (ours, plain, fused):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[1] == counts[2]
    assert sum(counts[0]["Global"].values()) == sum(counts[1]["Global"].values()) > 0


def test_formulas_are_known_to_a_counter_that_was_there_before():
    code = (
        "from torch.utils.flop_counter import flop_registry\nimport torch, dlfast\n"
        "assert torch.ops.dlfast._conv_relu_pool2d in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_trackers_see_every_layer():
    from torch.utils.module_tracker import ModuleTracker

    fused, plain = pair(Plain)
    seen = {}
    for name, model in (("fused", fused), ("plain", plain)):
        tracker, seen[name] = ModuleTracker(), []
        call = nn.Conv2d.forward
        with tracker, pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Conv2d, "forward", lambda m, x: (seen[name].append(set(tracker.parents)), call(m, x))[1])  # noqa: B023
            model(example_of(plain))
    assert seen["fused"] == seen["plain"]
    assert seen["plain"][0] == {"Global", "Plain", "Plain.0"}


# ---- Layers found by type, by name, and one by one ------------------------------------------------------------


@pytest.mark.parametrize("kind", AWKWARD, ids=lambda kind: kind.__name__)
def test_every_layer_is_what_it_was(kind):
    plain = kind()
    fused = dlfast.fuse(plain)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    assert repr(fused) == repr(plain)


def test_dropout_switched_on_by_name():
    model = dlfast.fuse(nn.Sequential(nn.Conv2d(1, 8, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU())).eval()
    x = torch.randn(2, 1, 20, 20)
    assert torch.equal(model(x), model(x))
    for layer in model.modules():
        if type(layer).__name__.startswith("Dropout"):
            layer.train()
    with recorded() as ran:
        assert not torch.equal(model(x), model(x))
    assert ran == ["conv", "conv"]


def test_initialised_by_name():
    def initialise(module):
        if "Conv2d" in type(module).__name__:
            nn.init.constant_(module.weight, 0.25)
        elif "BatchNorm2d" in type(module).__name__:
            nn.init.constant_(module.weight, 3.0)

    fused, plain = pair(Residual)
    fused = copy.deepcopy(fused)
    fused.apply(initialise), plain.apply(initialise)
    for have, want in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(have, want)


@pytest.mark.filterwarnings("ignore::dlfast.NotFusedWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["forward", "_conv_forward", "_check_input_dim", "__call__", "extra_repr"])
def test_a_method_put_on_a_layer(when, method):
    def doubled(self, x, *rest):
        return F.conv2d(x, self.weight * 2, self.bias, padding=1)

    put = {
        "forward": (0, doubled), "_conv_forward": (0, doubled),
        "_check_input_dim": (1, lambda self, x: (_ for _ in ()).throw(ArithmeticError("refused"))),
        "__call__": (0, doubled), "extra_repr": (2, lambda self: "mine"),
    }  # fmt: skip
    number, function = put[method]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).double()
    fused = None if when == "before" else dlfast.fuse(copy.deepcopy(plain), inplace=True)
    for model in (plain, fused):
        if model is not None:
            setattr(model[number], method, types.MethodType(function, model[number]))
    if fused is None:
        # Of a copy the bound method would run the layer that it was taken from, with or without us.
        fused = dlfast.fuse(plain, inplace=True)
        plain = dlfast.unfuse(fused)
    with recorded() as ran:
        if method == "_check_input_dim":
            for model in (fused, plain):
                with pytest.raises(ArithmeticError):
                    model(small_images())
        else:
            torch.testing.assert_close(fused(small_images()), plain(small_images()))
    assert "conv bn" not in ran or (method, when) == ("extra_repr", "before")  # of the ReLU, which stays by itself
    assert repr(fused) == repr(plain)


def test_a_method_replaced_on_the_class(monkeypatch):
    fused, plain = pair(Plain)
    whole = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: whole(self, x, w * 2, b))
    x = example_of(plain)
    with pytest.warns(dlfast.NotFusedWarning, match="a method of Conv2d was replaced"):
        torch.testing.assert_close(fused(x), plain(x))


def test_a_forward_replaced_on_the_class_of_the_model(monkeypatch):
    fused, plain = pair(Functional)
    monkeypatch.setattr(Functional, "forward", lambda self, x: self.a(x))
    with pytest.warns(dlfast.NotFusedWarning, match="Functional.forward was replaced"):
        torch.testing.assert_close(fused(example_of(plain)), plain(example_of(plain)))


# ---- Life and death ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plain, Normalised, Functional, Residual])
def test_freed_with_the_last_reference(kind):
    gc.collect()
    gc.disable()
    try:
        fused = dlfast.fuse(kind(), example_of(kind()))
        assert runs_fused(fused.eval(), example_of(fused))
        gone = [weakref.ref(p) for p in fused.parameters()] + [weakref.ref(m) for m in fused.modules()]
        del fused
        assert [ref() for ref in gone if ref() is not None] == []
    finally:
        gc.enable()


def test_a_forward_alone_is_not_the_model():
    forward = dlfast.fuse(layers()).forward
    with pytest.raises(ReferenceError, match="keep the module itself"):
        forward(small_images())


def test_a_replaced_layer_is_not_held():
    fused = dlfast.fuse(layers())
    gone = weakref.ref(fused[0])
    fused[0] = nn.Conv2d(3, 3, 1)
    assert gone() is None


def test_the_look_at_a_layer_is_one_comparison(monkeypatch):
    """What it costs while nothing changes: no attribute is read one by one."""
    fused = dlfast.fuse(layers())
    fused(small_images().float())
    monkeypatch.setattr(Link, "change", None)
    with recorded() as ran:
        fused(small_images().float())
    assert ran == ["conv"]
