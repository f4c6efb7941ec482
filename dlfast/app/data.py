"""Labelled images, split into train, val and test, as batches of tensors.

Whatever the source, an image arrives as float32 (channels, height, width), of the size and with the
channels that the network wants, shifted and scaled by the mean and deviation of its source. Splits and the
order of batches are functions of seeds alone, so that a run can be repeated and resumed. scikit-learn and
torchvision are imported where they are needed.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dlfast.app.errors import UsageError, one_line
from dlfast.app.folder import LeftOut, find

Size = tuple[int, int]  # height, width
Batch = tuple[Tensor, Tensor]  # float32 [B, C, H, W], int64 [B]

SPLIT_SEED = 0  # of the sources that come without a split: their test images are the same in every run
NOT_THE_NETWORK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
CONVERT_ONCE_BYTES = 256 * 2**20
# Mean and standard deviation of pixels in [0, 1], over all channels.
SCALES = {
    "digits": (0.305, 0.376),
    "mnist": (0.1307, 0.3081),
    "cifar10": (0.473, 0.252),
    "folder": (0.5, 0.5),
}
DOWNLOADS = Path("data")  # where mnist and cifar10 are looked for and downloaded to
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision turn colours into grey


@dataclass(frozen=True)
class Form:
    """What the network wants: grey is repeated, colours become grey where `channels` is 1."""

    channels: int
    size: Size
    mean: float
    std: float


@dataclass(frozen=True)
class Unreadable:
    """Stands in for a batch that could not be read.

    A DataLoader's worker process can hand an exception over only with its traceback pasted into the message.
    """

    message: str


class Images(Dataset[Batch]):
    """Images in memory.

    Args:
        images: uint8 or float32 in [0, 1], (N, C, H, W).
        labels: int64, (N,).
        form: of what comes out.
    """

    def __init__(self, images: Tensor, labels: Tensor, form: Form) -> None:
        self.images, self.labels, self.form = images, labels, form
        bytes_after = 4 * len(images) * form.channels * form.size[0] * form.size[1]
        self.converted = bytes_after <= CONVERT_ONCE_BYTES
        if self.converted:
            self.images = to_input(images, form)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        images = self.images[indices]
        return images if self.converted else to_input(images, self.form), self.labels[indices]


class ImageFiles(Dataset[Batch]):
    """Images read from files whenever they are asked for; `samples` is a list of (path, label)."""

    def __init__(self, samples: Sequence[tuple[str, int]], form: Form) -> None:
        self.samples, self.form = samples, form

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Batch | Unreadable:
        images = []
        for index in indices:
            path = self.samples[index][0]
            try:
                images.append(to_input(read_image(path, self.form.channels)[None], self.form))
            # Pillow's decoders raise what they like on broken files: OSError, SyntaxError, ValueError, ...
            except Exception as error:
                return Unreadable(f"{path}: not a readable image ({one_line(error)})")
        return torch.cat(images), torch.tensor([self.samples[index][1] for index in indices])


def read_image(path: str, channels: int) -> Tensor:
    """The image at `path` as viewers show it: upright as its EXIF says, transparent parts over white.

    Returns:
        (1 or `channels`, H, W), uint8; float32 in [0, 1] for a grey file of 16 bits.

    Raises:
        ValueError: the range of its pixels is unknown. Pillow's decoders raise more.
    """
    import numpy as np
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    with Image.open(path) as file:
        image: Any = ImageOps.exif_transpose(file)
        # Pillow would clip these to 8 bits instead of scaling them.
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            pixels = np.asarray(image, dtype=np.float32) / 65535
            if pixels.min() < 0 or pixels.max() > 1:
                raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16 bits")
            return torch.from_numpy(pixels)[None]
        # Nothing but an image's alpha may tell its shape from its background.
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        tensor: Tensor = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
        return tensor


def to_input(images: Tensor, form: Form) -> Tensor:
    """`images` (N, C, H, W), uint8 or float32 in [0, 1], as float32 (N, channels, *size), shifted and scaled.

    >>> grey = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    >>> to_input(grey, Form(channels=3, size=(28, 28), mean=0.5, std=0.5)).shape
    torch.Size([1, 3, 28, 28])
    """
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    if x.shape[1] == 3 and form.channels == 1:
        x = (x * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    if tuple(x.shape[2:]) != form.size:
        x = F.interpolate(x, form.size, mode="bilinear", antialias=True)
    return ((x - form.mean) / form.std).expand(-1, form.channels, -1, -1).contiguous()


@dataclass(frozen=True)
class Data:
    """What a source yields.

    `test_name` is the split that plays the test's part, and `fingerprint` is a digest of the content.
    `left_out` are the paths in a folder that were passed over, by reason; `dlfast.app.folder.told` makes a line.
    """

    train: Dataset[Batch]
    val: Dataset[Batch]
    test: Dataset[Batch]
    classes: tuple[str, ...]
    fingerprint: str
    test_name: str = "test"
    left_out: LeftOut = field(default_factory=dict)


def load(source: str, channels: int, size: Size, data_dir: Path | None = None, seed: int = 0) -> Data:
    """The images of `source`, one of `SOURCES`, for a network that takes `channels` and `size`.

    Args:
        data_dir: the folder of the files; "digits" takes none, "folder" needs one, and "mnist" and "cifar10"
            are looked for, and downloaded to, ``data`` without one.
        seed: of the split of a "folder" that comes without one.

    Raises:
        UsageError: the source is unknown, its files are missing, broken or too few.

    >>> data = load("digits", channels=1, size=(28, 28))
    >>> len(data.train), len(data.val), len(data.test)
    (1259, 179, 359)
    """
    if source not in SOURCES:
        raise UsageError(f"unknown data {source!r}; there are {', '.join(SOURCES)}")
    form = Form(channels, size, *SCALES[source])
    if source == "digits":
        if data_dir is not None:
            raise UsageError("--data-dir: the digits are part of scikit-learn and take no folder")
        return _digits(form)
    if data_dir is None:
        if source == "folder":
            raise UsageError("--data folder needs --data-dir, the folder of its files")
        data_dir = DOWNLOADS
    return SOURCES[source](data_dir, form, seed)


def batches(
    dataset: Dataset[Batch],
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    workers: int = 0,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Batches of `dataset`, in an order that `shuffle_seed` and the epoch decide, or in its own order."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=None if shuffle_seed is None else SeededShuffle(len(dataset), shuffle_seed),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )


def _as_is(batch: Any) -> Any:
    """The datasets make whole batches themselves. (A lambda could not be sent to a worker process.)"""
    return batch


class SeededShuffle(Sampler[int]):
    """A new order every epoch, the same for the same seed. Lightning calls `set_epoch`.

    >>> order = SeededShuffle(5, seed=0)
    >>> order.set_epoch(3)
    >>> list(order) == list(order), sorted(order)
    (True, [0, 1, 2, 3, 4])
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        # Not torch's generator: it takes 32 bits of seed only, too few for two independent numbers.
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.length).tolist())


def split(labels: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Indices of a first part and one more per fraction, every class in proportion.

    A class of enough members has at least one in each part.

    >>> split([0] * 10 + [1] * 20, [0.1], seed=0)[1]
    [4, 14, 28]
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(1 + len(fractions))]
    values = np.asarray(labels)
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label)).tolist()
        total = len(members)
        for part, fraction in zip(parts[1:], fractions, strict=True):
            count = max(1, round(total * fraction)) if total > len(fractions) else 0
            part += members[:count]
            members = members[count:]
        parts[0] += members
    return [sorted(part) for part in parts]


def _digits(form: Form) -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).float()[:, None]  # [1797, 1, 8, 8]
    labels = torch.from_numpy(bunch.target).long()
    parts = split(labels.tolist(), [0.1, 0.2], SPLIT_SEED)
    train, val, test = (Images(images[part], labels[part], form) for part in parts)
    return Data(train, val, test, tuple(str(c) for c in range(10)), _fingerprint(images, labels))


def _mnist(data_dir: Path, form: Form, seed: int) -> Data:
    from torchvision.datasets import MNIST

    names = [Path(name).stem for name, _ in MNIST.resources]
    train, test = _torchvision(MNIST, data_dir, data_dir / "MNIST" / "raw", names)
    return _with_val(train.data[:, None], train.targets, test.data[:, None], test.targets, form)


def _cifar10(data_dir: Path, form: Form, seed: int) -> Data:
    from torchvision.datasets import CIFAR10

    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    sets = _torchvision(CIFAR10, data_dir, data_dir / CIFAR10.base_folder, names)
    train, test = (
        (torch.from_numpy(one.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(one.targets))
        for one in sets  # data is [N, 32, 32, 3]
    )
    return _with_val(*train, *test, form)


def _torchvision(dataset: Callable[..., Any], root: Path, folder: Path, names: Iterable[str]) -> tuple[Any, Any]:
    """The training and the test set of one of torchvision's; its files `names` lie in `folder`, below `root`.

    They are downloaded only where one is absent.
    """
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        print(f"{folder}: no {', '.join(absent)}; downloading", flush=True)
        try:
            dataset(root, train=True, download=True)
        # torchvision, urllib and sockets fail in many ways; a full disk is not the network's fault.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NOT_THE_NETWORK:
                raise
            raise UsageError(f"{folder}: no {absent[0]}, and it cannot be downloaded ({one_line(error)})") from error
    try:
        return dataset(root, train=True), dataset(root, train=False)
    except PermissionError:
        raise
    # A damaged file is whatever its parser trips over.
    except Exception as error:
        raise UsageError(f"{folder}: files are corrupt ({one_line(error)})") from error


def _with_val(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, form: Form) -> Data:
    """The ten classes of MNIST or CIFAR-10; a tenth of the training images becomes val."""
    if len(images) != len(labels) or len(test_images) != len(test_labels):
        raise UsageError(f"{len(images)} images but {len(labels)} labels: the files do not belong together")
    for label in (*labels.tolist(), *test_labels.tolist()):
        if not 0 <= label < 10:
            raise UsageError(f"label {label} in the files is not one of the ten classes")
    train, val = split(labels.tolist(), [0.1], SPLIT_SEED)
    return Data(
        Images(images[train], labels[train], form),
        Images(images[val], labels[val], form),
        Images(test_images, test_labels, form),
        tuple(str(c) for c in range(10)),
        _fingerprint(images, labels, test_images, test_labels),
    )


def _folder(data_dir: Path, form: Form, seed: int) -> Data:
    """Class folders below `data_dir`, or below its ``train``, ``val`` and ``test``.

    Where there is no ``val``, a tenth of the images becomes val; and where there is no ``test`` either,
    another tenth becomes test. With ``val`` but no ``test``, val is what the run is tested on.
    """
    found = find(data_dir)
    train = found.parts["train"]
    parts = {name: samples for name, samples in found.parts.items() if name != "train"}

    if "val" not in parts:
        wanted = ["val"] if "test" in parts else ["val", "test"]
        labels = [label for _, label in train]
        pieces = [[train[i] for i in part] for part in split(labels, [0.1] * len(wanted), seed)]
        if not all(pieces):
            raise UsageError(f"{data_dir}: too few images ({len(train)}) to split into train and {', '.join(wanted)}")
        train = pieces[0]
        parts.update(zip(wanted, pieces[1:], strict=True))
    test_name = "test" if "test" in parts else "val"

    digest = hashlib.sha256()
    for name, samples in (("train", train), *sorted(parts.items())):
        for path, label in samples:
            line = f"{name} {Path(path).relative_to(data_dir)} {label} {Path(path).stat().st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return Data(
        ImageFiles(train, form),
        ImageFiles(parts["val"], form),
        ImageFiles(parts[test_name], form),
        tuple(found.classes),
        digest.hexdigest(),
        test_name,
        found.left_out,
    )


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


SOURCES: dict[str, Callable[[Path, Form, int], Data]] = {
    "digits": lambda _folder, form, _seed: _digits(form),
    "mnist": _mnist,
    "cifar10": _cifar10,
    "folder": _folder,
}
