"""Folders of images: as torchvision finds them, and what is no image or class of the user's is left out aloud."""

import os
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dlfast.app.cli import main
from dlfast.app.data import load
from dlfast.app.errors import UsageError
from dlfast.app.folder import HIDDEN, NO_CLASS, NO_IMAGE, find, told

FOLDERS = (
    ".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found",
    "__pycache__", "#recycle",
)  # fmt: skip
FILES = ("._0.png", ".DS_Store", ".hidden.JPG", "Thumbs.db", "desktop.ini")


def write(root, *names):
    """Images of these names, of 8x8 pixels; what is not named as an image has its bytes too."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            Image.new("L", (8, 8), 10 * number % 256).save(file, format="png")


def write_classes(root, count=2, classes=("cat", "dog")):
    write(root, *(f"{name}/{number}.png" for name in classes for number in range(count)))
    return root


def below(root, samples):
    return [(os.path.relpath(path, root), label) for path, label in samples]


EXPECTED = [("cat/0.png", 0), ("cat/1.png", 0), ("dog/0.png", 1), ("dog/1.png", 1)]


@pytest.mark.parametrize("name", FOLDERS)
def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path, name):
    write_classes(tmp_path)
    write(tmp_path, f"{name}/0.png", f"cat/{name}/1.png", f"dog/deep/{name}/2.png")
    found = find(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert below(tmp_path, found.parts["train"]) == EXPECTED
    assert found.left_out == {HIDDEN: [name, f"cat/{name}", f"dog/deep/{name}"]}


@pytest.mark.parametrize("name", FILES)
def test_hidden_files_are_no_images(tmp_path, name):
    write_classes(tmp_path)
    write(tmp_path, name, f"cat/{name}", f"dog/deep/{name}")
    found = find(tmp_path)
    assert below(tmp_path, found.parts["train"]) == EXPECTED
    assert found.left_out == {HIDDEN: [name, f"cat/{name}", f"dog/deep/{name}"]}


def test_hidden_in_folders_with_splits(tmp_path):
    for part in ("train", "val", "test"):
        write_classes(tmp_path / part)
    write(tmp_path, ".cache/a/0.png", "train/.cache/0.png", "val/__MACOSX/0.png", "test/cat/._0.png")
    found = find(tmp_path)
    assert found.classes == ["cat", "dog"]
    for part in ("train", "val", "test"):
        assert below(tmp_path / part, found.parts[part]) == EXPECTED
    assert found.left_out == {HIDDEN: [".cache", "train/.cache", "val/__MACOSX", "test/cat/._0.png"]}


def test_hidden_splits_are_no_splits(tmp_path):
    write_classes(tmp_path, count=20)
    write_classes(tmp_path / ".train")
    assert load("folder", 1, (8, 8), tmp_path).classes == ("cat", "dog")


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    root = write_classes(tmp_path / ".cache" / "photos")
    assert find(root).left_out == {}


def test_what_is_not_hidden_is_found_as_by_torchvision(tmp_path):
    """Endings in any case, folders in folders, links to images and folders; in the same order."""
    root = tmp_path / "photos"
    write(tmp_path, "elsewhere/9.png", "elsewhere/in/8.png", "one.png")
    write(
        root, "b/10.png", "b/9.png", "b/B.JPG", "b/a.jpeg", "b/x.TIFF", "b/m/1.png", "b/m/k/2.webp", "b/m-/1.png",
        "A/1.BMP", "A/b/1.pgm", "A/z.ppm", "été/1.tif",
    )  # fmt: skip
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "A" / "linked").symlink_to(tmp_path / "elsewhere" / "in")
    (root / "A" / "one.png").symlink_to(tmp_path / "one.png")
    expected = ImageFolder(str(root))
    found = find(root)
    assert found.classes == expected.classes == ["A", "b", "linked", "été"]
    assert found.parts["train"] == expected.samples
    assert len(expected.samples) == 16
    assert found.left_out == {}


def test_what_no_class_or_ending_covers_is_told(tmp_path):
    write_classes(tmp_path)
    write(tmp_path, "loose.png", "labels.csv", "cat/moving.gif", "cat/new.HEIC", "cat/png", "dog/in/notes.txt")
    found = find(tmp_path)
    assert below(tmp_path, found.parts["train"]) == EXPECTED
    assert found.left_out == {
        NO_CLASS: ["labels.csv", "loose.png"],
        NO_IMAGE: ["cat/moving.gif", "cat/new.HEIC", "cat/png", "dog/in/notes.txt"],
    }


def test_what_lies_beside_the_splits_is_told(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "val")
    write(tmp_path, "extra/cat/0.png", "readme.txt", "train/loose.png")
    assert find(tmp_path).left_out == {NO_CLASS: ["extra", "readme.txt", "train/loose.png"]}


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("Train", "Val"), "Train"),
        (("training", "validation", "test"), "training"),
        (("train", "validation"), "validation"),
        (("train", "val", "TEST"), "TEST"),
        (("train", "extra", "valid"), "valid"),
    ],
)
def test_splits_by_another_name_are_refused(tmp_path, folders, named):
    for folder in folders:
        write_classes(tmp_path / folder)
    with pytest.raises(UsageError, match=f"/{named}: the parts are called train, val and test; rename it"):
        find(tmp_path)


@pytest.mark.parametrize("classes", [("invalid", "valid"), ("plane", "training"), ("testing", "validation")])
def test_classes_may_be_called_nearly_as_splits(tmp_path, classes):
    assert find(write_classes(tmp_path, classes=classes)).classes == list(classes)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "photos: no class folders in it$"),
        ((".a/0.png", "__MACOSX/cat/0.png"), r"photos: no class folders in it; left out: 2 hidden .*\('\.a', '__MAC"),
        (("train/.a/0.png",), r"photos/train: no class folders in it; left out: 1 hidden .*\('train/\.a'\)"),
        (("cat/0.png", ".a/0.png"), r"at least two class folders, found only 'cat'; left out: 1 hidden .*'\.a'"),
        (("cat/0.png", "dog/._0.png"), r"no images \(.jpg, .*\) of the classes dog; left out: .*\('dog/._0.png'\)"),
        (("cat/0.png", "dog/0.gif", "eel/a/.b"), r"of the classes dog, eel; .* 1 not named as an image \('dog/0.gif"),
        (("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/.0.png"), r"photos/val: no images .* classes b"),
    ],
)
def test_folders_of_nothing_else_are_refused(tmp_path, names, message):
    root = tmp_path / "photos"
    root.mkdir()
    write(root, *names)
    with pytest.raises(UsageError, match=message):
        find(root)


@pytest.mark.parametrize(("link", "target"), [("cat/all", ".."), ("cat/deep/self", "."), ("eel", "."), ("fox", "..")])
def test_links_back_are_refused(tmp_path, link, target):
    """They would give a class the images of all others, dozens of times."""
    root = write_classes(tmp_path / "photos")
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(target)
    with pytest.raises(UsageError, match=f"{link}.*: is a link back to"):
        find(root)


def test_links_to_nothing_are_named(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "cat" / "9.png").symlink_to("gone.png")
    with pytest.raises(UsageError, match=r"cat/9.png: not a file, or a link to nothing"):
        find(tmp_path)


def test_folders_that_may_not_be_read_are_not_passed_over(tmp_path, monkeypatch):
    write_classes(tmp_path)
    write(tmp_path, "cat/closed/1.png")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("dlfast.app.folder.os.scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        find(tmp_path)


def test_told_fits_on_a_line_of_any_output():
    line = told({NO_CLASS: ["a\nb", os.fsdecode(b"\xff.png")], NO_IMAGE: ["1", "2", "3"], HIDDEN: ["1", "2", "3", "4"]})
    assert line.count("\n") == 0
    assert line.encode() == (
        b"2 in no class folder ('a\\nb', '\\udcff.png'), 3 not named as an image ('1', '2', '3'), "
        b"4 hidden or of the system ('1', '2', '3', ...)"
    )


def test_what_is_left_out_changes_nothing(tmp_path):
    write_classes(tmp_path, count=20)
    before = load("folder", 1, (8, 8), tmp_path)
    write(tmp_path, ".a/0.png", "cat/._0.png", "Thumbs.db", "dog/notes.txt")
    after = load("folder", 1, (8, 8), tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.val.samples == before.val.samples
    assert before.left_out == {}
    assert set(after.left_out) == {HIDDEN, NO_IMAGE}


def test_the_program_says_once_what_it_left_out(tmp_path, capsys):
    write_classes(tmp_path / "photos", count=10)
    command = ["train", "mnistnet", "--data", "folder", "--input-size", "8", "--epochs", "1"]
    folder = ["--data-dir", str(tmp_path / "photos")]
    assert main([*command, *folder, "--out", str(tmp_path / "clean")]) == 0
    assert "left out" not in capsys.readouterr().out
    write(tmp_path / "photos", ".ipynb_checkpoints/0.png", "cat/._0.png")
    assert main([*command, *folder, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "16 train, 2 val, 2 test images of 8x8, 2 classes" in lines[0]
    assert lines[1] == "left out: 2 hidden or of the system ('.ipynb_checkpoints', 'cat/._0.png')"
    assert sum("left out" in line for line in lines) == 1
