"""Which part of dlfast may import which: the library nothing of the program, and each package only what is below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dlfast"
# By package, or module of the root; "dlfast" is `import dlfast` itself. Every package may import itself.
ALLOWED = {
    "_native": set(),
    "_measurements": {"_native"},
    "reference": set(),
    "functional": {"_native", "reference"},
    "nn": {"_native", "functional", "reference"},
    "optim": {"_native", "reference"},
    "models": {"functional", "nn"},
    "ran": {"_native"},
    "choice": {"_native", "functional", "nn", "ran"},
    "fusion": {"_native", "choice", "functional", "nn", "ran"},
    "explain": {"choice", "fusion", "nn", "ran"},
    "graphed": {"optim"},
    "dlfast": {"_measurements", "explain", "functional", "fusion", "graphed", "models", "nn", "optim", "reference"},
    "info": {"_native", "dlfast"},
    "__main__": {"app"},
}
PARTS = {*ALLOWED, "app"}


def part_of(module: str) -> str:
    """
    >>> part_of("dlfast.nn.conv"), part_of("dlfast.choice"), part_of("dlfast")
    ('nn', 'choice', 'dlfast')
    """
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "dlfast"


def imports(source: str) -> list[tuple[int, str]]:
    """Line and part of every import of dlfast in a file, also of those inside functions and for types only."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["dlfast.a relative import"]
        elif isinstance(node, ast.ImportFrom) and node.module == "dlfast":
            names = [f"dlfast.{name.name}" if name.name in PARTS else "dlfast" for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found += [(node.lineno, part_of(name)) for name in names if name.partition(".")[0] == "dlfast"]
    return found


def violations(name: str, source: str) -> list[str]:
    """What a file, named as in "nn/conv.py", imports and may not."""
    own = "dlfast" if name == "__init__.py" else name.removesuffix(".py").partition("/")[0]
    if own == "app":
        return []
    if own not in ALLOWED:
        return [f"dlfast/{name}: {own} is not in the table of tests/test_layers.py"]
    fine = {own, *ALLOWED[own]}
    return [f"dlfast/{name}:{line}: {own} may not import {part}" for line, part in imports(source) if part not in fine]


def test_every_import_is_of_a_part_below():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = [line for file in files for line in violations(file.relative_to(PACKAGE).as_posix(), file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("nn/conv.py", "import torch\nfrom dlfast.app.train import fit\n", "nn/conv.py:2: nn may not import app"),
        ("explain.py", "def f():\n    import dlfast.app.cli\n", "explain.py:2: explain may not import app"),
        ("__init__.py", "from dlfast import app, nn\n", "__init__.py:1: dlfast may not import app"),
        ("functional/flops.py", "from dlfast.nn import conv\n", "functional may not import nn"),
        ("nn/plain.py", "from dlfast import fusion\n", "nn may not import fusion"),
        ("optim/sgd.py", "from dlfast import explain\n", "optim may not import explain"),
        ("optim/sgd.py", "import dlfast\n", "optim may not import dlfast"),
        ("optim/sgd.py", "from dlfast import __version__\n", "optim may not import dlfast"),
        ("nn/plain.py", "from . import conv\n", "nn may not import a relative import"),
        ("new.py", "import torch\n", "new is not in the table"),
    ],
)
def test_a_planted_import_is_found(name, source, said):
    (found,) = violations(name, source)
    assert found.startswith(f"dlfast/{name}:")
    assert said in found
