"""``dlfast bench bytes``: what each way of running a block on a GPU reads from memory and writes to it.

Computed, not measured: every kernel of a training step moves each of its operands once, which a cache can only
prevent between kernels for layers smaller than itself, and never undercut within one. Sizes are those of the tensors.
T is the output of the convolution, P the pooled output.

eager is PyTorch's sequence of kernels for ``F.max_pool2d(F.relu(conv(x)), ...)``: cuDNN adds no bias, so that
``conv2d`` adds it in a pass of its own; pooling keeps an int64 index per element of P; its backward fills the gradient
with zeros before it scatters into it. epilogue is cuDNN's convolution with one pass of dlfast after it, and one
before it in backward. single is one kernel of dlfast per result, which never writes T or its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from dlfast.models import NETWORKS

INDEX_BYTES, CODE_BYTES = 8, 1
# Of NVIDIA's data sheets, in bytes per second: A100 SXM 80 GB, H100 SXM, GeForce RTX 4090.
BANDWIDTHS = {"A100": 2039e9, "H100": 3350e9, "RTX 4090": 1008e9}
WAYS = ("eager", "pytorch", "single")


@dataclass(frozen=True)
class Kernel:
    """One launch, and the bytes of its operands."""

    name: str
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Layer:
    """A convolution block, from [n, c, h, h] to [n, k, t, t], pooled to [n, k, p, p]; pool_size 0 is no pooling."""

    network: str
    name: str
    n: int
    c: int
    k: int
    h: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    relu: bool = True
    bias: bool = True
    pool_size: int = 2
    pool_stride: int = 2
    pool_padding: int = 0
    needs_grad_input: bool = True

    def convolved(self) -> int:
        """Height and width of the convolution output."""
        return (self.h + 2 * self.padding - self.kernel) // self.stride + 1

    def pooled(self) -> int:
        """Height and width of the output."""
        if self.pool_size == 0:
            return self.convolved()
        return (self.convolved() + 2 * self.pool_padding - self.pool_size) // self.pool_stride + 1

    def has_single_kernel(self) -> bool:
        """Windows of 2x2 and 3x3 that do not overlap, and no pooling."""
        return (self.pool_size, self.pool_stride, self.pool_padding) in {(0, 2, 0), (2, 2, 0), (3, 3, 0)}


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of a layer, for elements of `item` bytes."""

    x: int
    w: int
    b: int
    t: int
    p: int
    index: int
    code: int

    @classmethod
    def of(cls, layer: Layer, item: int) -> Sizes:
        outputs = layer.n * layer.k * layer.pooled() ** 2
        pooled = outputs if layer.pool_size else 0
        return cls(
            x=layer.n * layer.c * layer.h**2 * item,
            w=layer.k * layer.c * layer.kernel**2 * item,
            b=layer.k * item if layer.bias else 0,
            t=layer.n * layer.k * layer.convolved() ** 2 * item,
            p=outputs * item,
            index=pooled * INDEX_BYTES,
            code=pooled * CODE_BYTES,
        )


@dataclass(frozen=True)
class Step:
    """The kernels of a forward and a backward pass."""

    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)


def compulsory(layer: Layer, item: int) -> int:
    """What the forward must move: input, weight, output, and one byte per pooled element.

    >>> compulsory(Layer("", "", n=1, c=2, k=3, h=4, padding=0), item=2)
    181
    """
    s = Sizes.of(layer, item)
    return s.x + s.w + s.p + s.code


def eager(layer: Layer, item: int) -> Step:
    """PyTorch's kernels, those of channels_last tensors.

    >>> for kernel in eager(Layer("", "", n=1, c=4, k=8, h=8), item=2).forward:
    ...     print(kernel)
    Kernel(name='convolution', read=1088, written=1024)
    Kernel(name='add bias', read=1040, written=1024)
    Kernel(name='relu', read=1024, written=1024)
    Kernel(name='max pool', read=1024, written=1280)
    """
    s = Sizes.of(layer, item)
    step = Step([Kernel("convolution", s.x + s.w, s.t)])
    if layer.bias:
        step.forward.append(Kernel("add bias", s.t + s.b, s.t))
    if layer.relu:
        step.forward.append(Kernel("relu", s.t, s.t))
    if layer.pool_size:
        step.forward.append(Kernel("max pool", s.t, s.p + s.index))
        step.backward.append(Kernel("fill with zeros", 0, s.t))
        step.backward.append(Kernel("max pool backward", s.p + s.index, s.t))
    if layer.relu:
        step.backward.append(Kernel("relu backward", 2 * s.t, s.t))
    if layer.bias:
        step.backward.append(Kernel("sum for grad_bias", s.t, s.b))
    _add_dense_gradients(step, layer, s)
    return step


def _add_dense_gradients(step: Step, layer: Layer, s: Sizes) -> None:
    if layer.needs_grad_input:
        step.backward.append(Kernel("convolution, grad_input", s.t + s.w, s.x))
    step.backward.append(Kernel("convolution, grad_weight", s.t + s.x, s.w))


def _gradient(layer: Layer, s: Sizes) -> int:
    """The gradient of the output and its code; without pooling the output itself says where ReLU passes gradient."""
    return s.p + (s.code if layer.pool_size else s.p if layer.relu else 0)


def epilogue(layer: Layer, item: int) -> Step:
    """cuDNN's convolution, and one pass of dlfast for bias, ReLU and pooling in each direction."""
    s = Sizes.of(layer, item)
    step = Step([Kernel("convolution", s.x + s.w, s.t)])
    if layer.bias or layer.relu or layer.pool_size:
        step.forward.append(Kernel("bias, ReLU, pool", s.t + s.b, s.p + s.code))
    if layer.pool_size or layer.relu:
        step.backward.append(Kernel("expand gradient", _gradient(layer, s), s.t))
    if layer.bias:
        step.backward.append(Kernel("grad_bias from the pooled gradient", _gradient(layer, s), s.b))
    _add_dense_gradients(step, layer, s)
    return step


def single(layer: Layer, item: int) -> Step | None:
    """One kernel of dlfast each; partial sums of grad_weight, which depend on the device, are left out."""
    if not layer.has_single_kernel():
        return None
    s = Sizes.of(layer, item)
    gradient = _gradient(layer, s)
    step = Step([Kernel("convolution, bias, ReLU, pool", s.x + s.w + s.b, s.p + s.code)])
    if layer.needs_grad_input:
        step.backward.append(Kernel("grad_input", gradient + s.w, s.x))
    step.backward.append(Kernel("grad_weight, grad_bias", gradient + s.x, s.w + s.b))
    return step


def layers() -> Iterator[Layer]:
    """The convolution blocks of the five networks, of VGG-16, and the stem of ResNet without its normalisation."""
    for name, network in NETWORKS.items():
        channels, size = network.in_channels, network.input_size
        for number, stage in enumerate(network.stages, 1):
            layer = Layer(
                name, f"conv{number}", network.batch_size, channels, stage.channels, size,
                stage.kernel_size, 1, stage.padding, stage.relu,
                pool_size=2 if stage.pool else 0, needs_grad_input=number > 1,
            )  # fmt: skip
            yield layer
            channels, size = stage.channels, layer.pooled()
    yield Layer(
        "resnet", "stem", 32, 3, 64, 224, 7, 2, 3, bias=False, pool_size=3, pool_padding=1, needs_grad_input=False
    )
    channels, size = 3, 224
    for number, (width, convolutions) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
        for index in range(1, convolutions + 1):
            layer = Layer(
                "vgg16", f"conv{number}_{index}", 32, channels, width, size,
                pool_size=2 if index == convolutions else 0, needs_grad_input=(number, index) != (1, 1),
            )  # fmt: skip
            yield layer
            channels, size = width, layer.pooled()


Moved = dict[str, int | None]  # bytes of each way, None where there is no such way


@dataclass(frozen=True)
class Row:
    """A layer, or the sum of a network's."""

    network: str
    layer: str
    compulsory: int
    forward: Moved
    backward: Moved


def row_of(layer: Layer, item: int) -> Row:
    steps = {"eager": eager(layer, item), "pytorch": epilogue(layer, item), "single": single(layer, item)}
    forward = {way: None if step is None else _sum(step.forward) for way, step in steps.items()}
    backward = {way: None if step is None else _sum(step.backward) for way, step in steps.items()}
    return Row(layer.network, layer.name, compulsory(layer, item), forward, backward)


def rows(item: int) -> list[Row]:
    """A row per layer, and after those of a network their sum; where there is no single kernel, the epilogue counts."""
    result: list[Row] = []
    for network in dict.fromkeys(layer.network for layer in layers()):
        own = [row_of(layer, item) for layer in layers() if layer.network == network]
        result += own
        if len(own) > 1:
            forward: Moved = {way: sum(_or_epilogue(row.forward, way) for row in own) for way in WAYS}
            backward: Moved = {way: sum(_or_epilogue(row.backward, way) for row in own) for way in WAYS}
            result.append(Row(network, "all", sum(row.compulsory for row in own), forward, backward))
    return result


def _sum(kernels: list[Kernel]) -> int:
    return sum(kernel.bytes for kernel in kernels)


def _or_epilogue(moved: Moved, way: str) -> int:
    count = moved[way] if moved[way] is not None else moved["pytorch"]
    assert count is not None
    return count


def as_dict(item: int) -> dict[str, object]:
    """Everything, with the kernels of every way, for a JSON file."""
    every = []
    for layer in layers():
        ways = {"eager": eager(layer, item), "pytorch": epilogue(layer, item), "single": single(layer, item)}
        kernels = {way: step and asdict(step) for way, step in ways.items()}
        every.append({"layer": asdict(layer), "compulsory": compulsory(layer, item), "kernels": kernels})
    return {"computed, not measured": True, "bytes of an element": item, "layers": every}


def markdown(item: int, dtype: str) -> str:
    """The committed table: MB moved, and the least time that takes on three GPUs."""
    lines = [
        "# Bytes that a training step moves on a GPU",
        "",
        "Written by `dlfast bench bytes`, checked by a test. **Computed, not measured**: every kernel moves each of",
        "its operands once (`dlfast/app/bench/traffic.py` lists the kernels of each way). Times are these bytes at the",
        "bandwidth of the data sheet, so a lower bound, and a useful one only where memory is what a kernel waits for:",
        f"{_bandwidths()}.",
        "",
        f"{dtype}, channels_last, batch sizes of the networks' articles, else 32. MB forward + backward; `single`",
        "counts the epilogue where windows overlap (resnet), and leaves out partial sums of grad_weight.",
        "",
        "| layer | compulsory, forward | eager | epilogue | single | eager / single "
        + "".join(f"| {name}: least µs of eager, epilogue, single " for name in BANDWIDTHS)
        + "|",
        "|---|---|---|---|---|---|" + "---|" * len(BANDWIDTHS),
    ]
    for row in rows(item):
        moved = {way: (_or_epilogue(row.forward, way), _or_epilogue(row.backward, way)) for way in WAYS}
        cells = [f"{forward / 1e6:.2f} + {backward / 1e6:.2f}" for forward, backward in moved.values()]
        if row.forward["single"] is None:
            cells[-1] = "-"
        totals = {way: sum(both) for way, both in moved.items()}
        times = [" / ".join(_microseconds(total / speed) for total in totals.values()) for speed in BANDWIDTHS.values()]
        ratio = totals["eager"] / totals["single"]
        name = f"**{row.network}**" if row.layer == "all" else f"{row.network} {row.layer}"
        line = [name, f"{row.compulsory / 1e6:.2f}", *cells, f"{ratio:.1f}x", *times]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def _bandwidths() -> str:
    return ", ".join(f"{name} {speed / 1e9:.0f} GB/s" for name, speed in BANDWIDTHS.items())
