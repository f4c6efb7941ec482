"""Data: what arrives at the network, the splits, and files in the real formats (written here, small)."""

import gzip
import hashlib
import http.server
import pickle
import struct
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dlfast.app.data import SOURCES, Form, SeededShuffle, Unreadable, batches, load, read_image, split, to_input
from dlfast.app.errors import UsageError


def every(dataset, batch_size=64):
    images, labels = zip(*batches(dataset, batch_size), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_are_split_in_proportion_and_stay_so():
    data = load("digits", 1, (28, 28))
    again = load("digits", 1, (28, 28), seed=5)
    assert data.fingerprint == again.fingerprint
    total = 0
    for part in ("train", "val", "test"):
        images, labels = every(getattr(data, part))
        assert torch.equal(images, every(getattr(again, part))[0])
        shares = labels.bincount(minlength=10) / len(labels)
        assert shares.min() > 0.07
        assert shares.max() < 0.13
        total += len(labels)
    assert total == 1797


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (1, (5, 17))])
def test_digits_come_as_the_network_wants_them(channels, size):
    images, labels = every(load("digits", channels, size).val)
    assert images.shape[1:] == (channels, *size)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.mean().abs() < 0.05
    assert 0.8 < images.std() < 1.05  # resizing smooths
    assert all(torch.equal(images[:, 0], images[:, c]) for c in range(channels))


def test_images_too_large_to_convert_at_once_come_out_the_same(monkeypatch):
    whole, labels = every(load("digits", 3, (16, 16)).val)
    monkeypatch.setattr("dlfast.app.data.CONVERT_ONCE_BYTES", 1000)
    data = load("digits", 3, (16, 16))
    assert not data.val.converted
    torch.testing.assert_close(every(data.val), (whole, labels))


def test_to_input_makes_grey_of_colours():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(to_input(red, Form(1, (1, 1), 0.5, 0.5)).item(), 0.299 * 2 - 1)


def test_split_parts_are_disjoint_and_complete():
    labels = [0] * 3 + [1] * 50 + [2] * 2
    parts = split(labels, [0.1, 0.1], seed=3)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert parts == split(labels, [0.1, 0.1], seed=3)
    assert parts != split(labels, [0.1, 0.1], seed=4)
    assert all(any(labels[i] == 0 for i in part) for part in parts)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        shuffle = SeededShuffle(100, seed)
        shuffle.set_epoch(epoch)
        return list(shuffle)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_dir(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def test_mnist_from_its_files(mnist_dir):
    data = load("mnist", 1, (28, 28), mnist_dir)
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 20]
    images, labels = every(data.test)
    assert labels.tolist() == [i % 10 for i in range(20)]
    raw = (mnist_dir / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    expected = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(20, 1, 28, 28)
    torch.testing.assert_close(images, (expected / 255 - 0.1307) / 0.3081)


def test_mnist_damaged(mnist_dir):
    file = mnist_dir / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="MNIST/raw: files are corrupt"):
        load("mnist", 1, (28, 28), mnist_dir)


def test_mnist_labels_of_other_images(mnist_dir):
    write_idx(mnist_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.arange(39) % 10)
    with pytest.raises(UsageError, match="40 images but 39 labels"):
        load("mnist", 1, (28, 28), mnist_dir)


def test_mnist_label_out_of_range(mnist_dir):
    write_idx(mnist_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.arange(40) % 11)
    with pytest.raises(UsageError, match="label 10"):
        load("mnist", 1, (28, 28), mnist_dir)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_absent_files_that_cannot_be_downloaded(tmp_path, source):
    with pytest.raises(UsageError, match=r"and it cannot be downloaded"):
        load(source, 1, (28, 28), tmp_path)


@pytest.mark.usefixtures("no_network")
def test_mnist_incomplete(mnist_dir):
    (mnist_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="no t10k-labels-idx1-ubyte, and it cannot be downloaded"):
        load("mnist", 1, (28, 28), mnist_dir)


@pytest.fixture
def serve(tmp_path_factory):
    """A folder, and the address under which this machine serves it."""
    folder = tmp_path_factory.mktemp("mirror")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_mnist_is_downloaded_where_absent(mnist_dir, tmp_path_factory, monkeypatch, serve):
    """torchvision's own download, from a mirror on this machine."""
    from torchvision.datasets import MNIST

    folder, address = serve
    resources = []
    for name, _ in MNIST.resources:
        packed = gzip.compress((mnist_dir / "MNIST" / "raw" / name.removesuffix(".gz")).read_bytes())
        (folder / name).write_bytes(packed)
        resources.append((name, hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [address])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = load("mnist", 1, (28, 28), tmp_path_factory.mktemp("fresh"))
    assert data.fingerprint == load("mnist", 1, (28, 28), mnist_dir).fingerprint


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch):
    """Pickles as CIFAR-10's, with torchvision told their checksums."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count):
        data = rng.integers(0, 256, (count, 3072)).astype(np.uint8)
        return {"data": data, "labels": [i % 10 for i in range(count)]}

    monkeypatch.setattr(CIFAR10, "train_list", [write(name, batch(20)) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [write(name, batch(20)) for name, _ in CIFAR10.test_list])
    meta = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


def test_cifar10_from_its_files(cifar_dir):
    data = load("cifar10", 3, (32, 32), cifar_dir)
    assert [len(part) for part in (data.train, data.val, data.test)] == [90, 10, 20]
    images, labels = every(data.test)
    content = pickle.loads((cifar_dir / "cifar-10-batches-py" / "test_batch").read_bytes())
    expected = torch.from_numpy(content["data"]).view(20, 3, 32, 32)
    torch.testing.assert_close(images, (expected / 255 - 0.473) / 0.252)
    assert labels.tolist() == content["labels"]
    assert every(load("cifar10", 1, (28, 28), cifar_dir).val)[0].shape == (10, 1, 28, 28)


def test_cifar10_damaged(cifar_dir):
    (cifar_dir / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"broken")
    with pytest.raises(UsageError, match="cifar-10-batches-py: files are corrupt"):
        load("cifar10", 3, (32, 32), cifar_dir)


def write_images(folder, count, classes=("cat", "dog"), size=(12, 10)):
    rng = np.random.default_rng(len(str(folder)))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_without_splits(tmp_path, channels):
    write_images(tmp_path, 20, ("ant", "bee", "cat"))
    data = load("folder", channels, (8, 9), tmp_path)
    assert data.classes == ("ant", "bee", "cat")
    assert [len(part) for part in (data.train, data.val, data.test)] == [48, 6, 6]
    images, _ = every(data.train)
    assert images.shape == (48, channels, 8, 9)
    paths = [[path for path, _ in part.samples] for part in (data.train, data.val, data.test)]
    assert len({path for part in paths for path in part}) == 60
    again = load("folder", channels, (8, 9), tmp_path)
    assert [s for s, _ in again.val.samples] == paths[1]
    assert [s for s, _ in load("folder", channels, (8, 9), tmp_path, seed=1).val.samples] != paths[1]


def test_folder_with_splits(tmp_path):
    for name, count in (("train", 6), ("val", 2), ("test", 3)):
        write_images(tmp_path / name, count)
    data = load("folder", 3, (8, 8), tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 6]
    assert data.test_name == "test"


def test_folder_without_test_is_tested_on_val(tmp_path):
    for name, count in (("train", 6), ("val", 2)):
        write_images(tmp_path / name, count)
    data = load("folder", 3, (8, 8), tmp_path)
    assert data.test_name == "val"
    assert data.test.samples == data.val.samples


def test_folder_of_train_only_or_with_test(tmp_path):
    write_images(tmp_path / "train", 20)
    data = load("folder", 3, (8, 8), tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [32, 4, 4]
    write_images(tmp_path / "test", 3)
    data = load("folder", 3, (8, 8), tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [36, 4, 6]


def test_pixels_of_files_arrive_unchanged(tmp_path):
    write_images(tmp_path, 5, size=(8, 8))
    grey16 = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(grey16).save(tmp_path / "cat" / "0.png")
    data = load("folder", 3, (8, 8), tmp_path)
    for part in (data.train, data.val, data.test):
        images, _ = every(part)
        for image, (path, _) in zip(images, part.samples, strict=True):
            pixels = np.asarray(Image.open(path))
            full = 65535 if pixels.dtype == np.uint16 else 255
            expected = torch.from_numpy(pixels.astype(np.float32) / full * 2 - 1)
            expected = expected.expand(3, 8, 8) if expected.dim() == 2 else expected.permute(2, 0, 1)
            torch.testing.assert_close(image, expected)


def saved(path, pixels, mode=None, **options):
    Image.fromarray(pixels, mode).save(path, **options)
    return str(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_arrive_upright(tmp_path, orientation):
    """As every viewer shows them; the camera turns a portrait by its EXIF orientation alone."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
        6: stored.T[:, ::-1], 7: stored.T[::-1, ::-1], 8: stored.T[::-1],
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "photo.png", stored, exif=exif)
    assert read_image(path, 1)[0].tolist() == turned[orientation].tolist()
    assert read_image(path, 3)[2].tolist() == turned[orientation].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_parts_are_white(tmp_path, channels):
    """A black drawing on a transparent ground is black everywhere but for its alpha."""
    drawing = np.zeros((2, 2, 4), dtype=np.uint8)
    drawing[0, :, 3] = 255, 51
    for name, image in (
        ("rgba.png", Image.fromarray(drawing)),
        ("la.png", Image.fromarray(drawing).convert("LA")),
        ("lossless.webp", Image.fromarray(drawing)),
    ):
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        expected = [[[0, 204], [255, 255]]] * channels
        assert read_image(str(tmp_path / name), channels).tolist() == expected, name


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_transparent_colours_of_a_palette_are_white(tmp_path, transparency, recwarn):
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "palette.png", transparency=transparency)
    assert read_image(str(tmp_path / "palette.png"), 3).flatten(1).T.tolist() == [[10, 20, 30], [255, 255, 255]]
    assert not recwarn.list


@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_alpha_changes_no_pixel(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    with_alpha = saved(tmp_path / "with.png", pixels)
    without = saved(tmp_path / "without.png", np.ascontiguousarray(pixels[..., :3]))
    assert torch.equal(read_image(with_alpha, channels), read_image(without, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_inks_of_print_and_single_bits_become_colours(tmp_path, channels):
    inks = np.zeros((1, 2, 4), dtype=np.uint8)
    inks[0, 0, 3] = 255  # black ink, then none
    assert read_image(saved(tmp_path / "cmyk.tif", inks, "CMYK"), channels).tolist() == [[[0, 255]]] * channels
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bit.png")
    assert read_image(str(tmp_path / "bit.png"), channels).tolist() == [[[0, 255]]] * channels


def test_pixels_of_unknown_range_are_refused(tmp_path):
    """Pillow's conversion would make floats in [0, 1] black."""
    numbers = np.full((4, 4), 0.5, dtype=np.float32)
    with pytest.raises(ValueError, match="floating-point pixels have no known range"):
        read_image(saved(tmp_path / "float.tif", numbers), 1)
    for value in (70000, -1):
        with pytest.raises(ValueError, match="32 bits have no known range"):
            read_image(saved(tmp_path / "int.tif", np.full((4, 4), value, dtype=np.int32)), 1)
    full = np.full((4, 4), 65535, dtype=np.int32)
    assert read_image(saved(tmp_path / "int.tif", full), 1).unique().tolist() == [1.0]


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_image_is_named(tmp_path, content):
    write_images(tmp_path, 5)
    bad = tmp_path / "cat" / "2.png"
    bad.write_bytes(bad.read_bytes()[:200] if content == "truncated" else content)
    data = load("folder", 1, (8, 8), tmp_path)
    parts = [batch for part in (data.train, data.val, data.test) for batch in batches(part, 64)]
    (found,) = [batch for batch in parts if isinstance(batch, Unreadable)]
    assert str(bad) in found.message
    assert "\n" not in found.message


def only_val(folder):
    write_images(folder / "val", 2)


def other_classes(folder):
    write_images(folder / "train", 2)
    write_images(folder / "val", 2, ("cat", "cow"))


def one_class(folder):
    write_images(folder, 20, ("cat",))


def few(folder):
    write_images(folder, 1)


def empty_class(folder):
    write_images(folder, 5)
    (folder / "eel").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.rmdir(), "no such folder"),
        (lambda folder: None, "no class folders in it"),
        (only_val, "has val but no train folder"),
        (other_classes, r"val: its classes \['cat', 'cow'\] are not those of train"),
        (one_class, "at least two class folders"),
        (few, "too few images"),
        (empty_class, "no images .* of the classes eel"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    folder = tmp_path / "images"
    folder.mkdir()
    make(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load("folder", 3, (8, 8), folder)
    assert str(folder) in str(caught.value)


def test_sources_and_folders_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="unknown data 'imagenet'"):
        load("imagenet", 3, (8, 8), tmp_path)
    with pytest.raises(UsageError, match="--data-dir"):
        load("digits", 3, (8, 8), tmp_path)
    with pytest.raises(UsageError, match="--data folder needs --data-dir"):
        load("folder", 3, (8, 8))


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_what_can_be_downloaded_has_a_folder(source, monkeypatch):
    monkeypatch.setitem(SOURCES, source, lambda folder, form, seed: folder)
    assert load(source, 3, (8, 8)) == Path("data")


def test_fingerprint_follows_the_content(tmp_path):
    write_images(tmp_path, 10)
    before = load("folder", 3, (8, 8), tmp_path).fingerprint
    assert load("folder", 3, (8, 8), tmp_path).fingerprint == before
    (tmp_path / "cat" / "3.png").rename(tmp_path / "cat" / "new.png")
    assert load("folder", 3, (8, 8), tmp_path).fingerprint != before
