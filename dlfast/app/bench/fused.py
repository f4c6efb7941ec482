"""Models of torchvision before and after ``dlfast.fuse``: training step, inference, what is kept for backward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dlfast
from dlfast.app.bench.problems import COMPILED, MODES, Call, Problem, Variant, add

# Batch of images of 224x224 for each model: a training step takes about a second on two cores.
MODELS: dict[str, int] = {
    "alexnet": 16,
    "vgg11": 4,
    "vgg11_bn": 4,
    "vgg16": 2,
    "vgg16_bn": 2,
    "resnet18": 8,
    "resnet50": 4,
    "googlenet": 8,
    "squeezenet1_1": 8,
    "densenet121": 4,
    "mobilenet_v3_small": 16,
    "mobilenet_v2": 8,
    "efficientnet_b0": 8,
    "mnasnet1_0": 8,
    "shufflenet_v2_x1_0": 16,
    "regnet_y_400mf": 8,
    "resnext50_32x4d": 4,
    "wide_resnet50_2": 2,
    "inception_v3": 4,
}


def models(names: list[str], batch_size: int | None, compile: bool, device: str) -> Iterator[Problem]:
    """Each model in every mode of PyTorch, with its fused SGD, and fused, with ours."""
    import torchvision

    for name in names:
        batch = batch_size or MODELS[name]
        images = torch.randn(batch, 3, 224, 224, device=device)
        labels = torch.randint(1000, (batch,), device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(name, weights=None, **options).to(device)
        problem = Problem(f"{name}, batch {batch}", [])
        for ours in (True, False):
            for mode, channels_last, compiled in MODES + (COMPILED if compile and not ours else []):
                label = ("dlfast" if ours else "PyTorch") + mode
                add(problem, _variant(label, ours, model, images, labels, channels_last, compiled))
        found = dlfast.explain(model, images)
        problem.notes.append(str(found).partition("\n")[0])
        yield problem


def _variant(
    label: str, ours: bool, model: nn.Module, images: Tensor, labels: Tensor, channels_last: bool, compiled: bool
) -> Variant:
    trained = copy.deepcopy(model).train()
    if channels_last:
        trained = trained.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if ours:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dlfast.NotFusedWarning)
            trained = dlfast.fuse(trained, images)
    used = copy.deepcopy(trained).eval()
    optimizer: torch.optim.Optimizer
    if ours:
        optimizer = dlfast.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9, fused=True)
    run: Callable[[Tensor], Tensor] = torch.compile(trained) if compiled else trained
    infer: Callable[[Tensor], Tensor] = torch.compile(used) if compiled else used

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def inference() -> None:
        with torch.inference_mode():
            infer(images)

    calls: dict[str, Call] = {"inference": inference, "training step": step}
    return Variant(label, ours, calls, None if compiled else trained, images)
