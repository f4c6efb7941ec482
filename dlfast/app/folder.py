"""Which files below a folder are images, and of which class.

The same files in the same order as torchvision's ImageFolder finds, without what tools and systems leave
behind; and nothing is passed over without a record.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlfast.app.errors import UsageError

Sample = tuple[str, int]  # path, label
LeftOut = dict[str, list[str]]  # paths by reason

SPLITS = ("train", "val", "test")
MEANT = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
# Besides names that start with a dot; in lower case.
SYSTEM = frozenset({
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
HIDDEN = "hidden or of the system"
NO_CLASS = "in no class folder"
NO_IMAGE = "not named as an image"
SHOWN = 3


@dataclass(frozen=True)
class Found:
    """What :func:`find` found; `parts` has only "train" where the folder comes without a split."""

    parts: dict[str, list[Sample]]
    classes: list[str]
    left_out: LeftOut


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a tool's or a system's, and not the user's.

    >>> [is_hidden(name) for name in (".ipynb_checkpoints", "._cat.jpg", "Thumbs.db", "cat.jpg")]
    [True, True, True, False]
    """
    return name.startswith(".") or name.lower() in SYSTEM


def told(left_out: Mapping[str, Sequence[str]]) -> str:
    """Counts by reason, and some names, on one line.

    >>> told({"hidden or of the system": [".git"], "in no class folder": ["a.png", "b.png", "c.png", "d.png"]})
    "1 hidden or of the system ('.git'), 4 in no class folder ('a.png', 'b.png', 'c.png', ...)"
    """
    reasons = []
    for reason, paths in left_out.items():
        # As repr, since a name may hold line breaks, or bytes that no output can show.
        names = [repr(path) for path in paths[:SHOWN]] + ["..."] * (len(paths) > SHOWN)
        reasons.append(f"{len(paths)} {reason} ({', '.join(names)})")
    return ", ".join(reasons)


def find(folder: Path) -> Found:
    """The images in the class folders below `folder`, or below its ``train``, ``val`` and ``test``.

    An image is a file with one of torchvision's endings, in any case, at any depth of its class folder. Links
    are followed.

    Raises:
        UsageError: there is no such folder, it has fewer than two classes, a class has no images, the parts
            have other classes, a folder seems to be a part by another name, or a link leads nowhere or back.
        OSError: a folder cannot be read.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("dog/1.PNG", "cat/2.png", "cat/._2.png", ".cache/3.png"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     _ = (root / name).write_bytes(b"")
    >>> found = find(root)
    >>> found.classes, [label for _, label in found.parts["train"]]
    (['cat', 'dog'], [0, 1])
    >>> found.left_out
    {'hidden or of the system': ['.cache', 'cat/._2.png']}
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    left_out: LeftOut = {}
    with os.scandir(folder) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    _check_names(folder, folders)
    present = [name for name in SPLITS if name in folders]
    if not present:
        classes, samples = _class_folders(folder, folder, left_out)
        return Found({"train": samples}, classes, left_out)
    if "train" not in present:
        raise UsageError(f"{folder}: has {' and '.join(sorted(present))} but no train folder")
    for entry in _entries(str(folder), folder, left_out):
        if entry.name not in present:
            _leave_out(left_out, NO_CLASS, entry.path, folder)
    parts = {}
    for name in present:
        found, parts[name] = _class_folders(folder / name, folder, left_out)
        if name == "train":
            classes = found
        elif found != classes:
            raise UsageError(f"{folder / name}: its classes {found} are not those of train, {classes}")
    return Found(parts, classes, left_out)


def _check_names(folder: Path, folders: list[str]) -> None:
    """Refuse what would be classes called Train and Val, or a validation that is not looked at."""
    meant = {name: MEANT.get(name.lower(), name.lower()) for name in folders}
    other = [name for name in folders if name not in SPLITS and meant[name] in SPLITS]
    if other and ("train" in folders or ("train" in meant.values() and set(meant.values()) <= set(SPLITS))):
        raise UsageError(f"{folder / other[0]}: the parts are called train, val and test; rename it")


def _class_folders(folder: Path, root: Path, left_out: LeftOut) -> tuple[list[str], list[Sample]]:
    """The names of the classes in `folder`, and their images; what is left out is named as below `root`."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = []
    for entry in _entries(str(folder), root, left_out):
        if entry.is_dir():
            classes.append(entry.name)
        else:
            _leave_out(left_out, NO_CLASS, entry.path, root)
    note = f"; left out: {told(left_out)}" if left_out else ""
    if not classes:
        raise UsageError(f"{folder}: no class folders in it{note}")
    if len(classes) < 2:
        raise UsageError(f"{folder}: needs at least two class folders, found only {classes[0]!r}{note}")

    samples: list[Sample] = []
    empty = []
    above = (os.path.realpath(root), os.path.realpath(folder))
    for label, name in enumerate(classes):
        paths = _images(os.path.join(folder, name), above, IMG_EXTENSIONS, root, left_out)
        samples += [(path, label) for path in paths]
        if not paths:
            empty.append(name)
    if empty:
        note = f"; left out: {told(left_out)}" if left_out else ""
        raise UsageError(f"{folder}: no images ({', '.join(IMG_EXTENSIONS)}) of the classes {', '.join(empty)}{note}")
    return classes, samples


def _images(folder: str, above: tuple[str, ...], endings: tuple[str, ...], root: Path, left_out: LeftOut) -> list[str]:
    """Paths of the images below `folder`, sorted by folder and then by name; it lies in the folders `above`."""
    real = os.path.realpath(folder)
    if real in above:
        raise UsageError(f"{folder}: is a link back to {real}, in which it lies")
    files: list[str] = []
    below: list[str] = []
    for entry in _entries(folder, root, left_out):
        if entry.is_dir():
            below += _images(entry.path, (*above, real), endings, root, left_out)
        elif not entry.name.lower().endswith(endings):
            _leave_out(left_out, NO_IMAGE, entry.path, root)
        elif not entry.is_file():
            raise UsageError(f"{entry.path}: not a file, or a link to nothing")
        else:
            files.append(entry.path)
    return files + sorted(below, key=os.path.split)


def _entries(folder: str, root: Path, left_out: LeftOut) -> list[os.DirEntry[str]]:
    """What is in `folder`, sorted by name; hidden entries are left out."""
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        if is_hidden(entry.name):
            _leave_out(left_out, HIDDEN, entry.path, root)
    return [entry for entry in entries if not is_hidden(entry.name)]


def _leave_out(left_out: LeftOut, reason: str, path: str, root: Path) -> None:
    left_out.setdefault(reason, []).append(os.path.relpath(path, root))
