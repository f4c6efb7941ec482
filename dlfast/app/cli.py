"""The ``dlfast`` command: finds the sub-command, and turns errors of use into one line and status 2.

A sub-command is a module with ``add_arguments(parser)`` and ``run(args) -> exit status``. Only the one that
was asked for is imported.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from dlfast.app.errors import UsageError, one_line

COMMANDS = {
    "train": ("dlfast.app.train", "train a network on images"),
    "bench": ("dlfast.app.bench.cli", "time and weigh fused against plain PyTorch"),
    "demo": ("dlfast.app.demo", "train mnistnet fused and plain, and compare"),
    "info": ("dlfast.info", "versions and backends, for a bug report"),
}
# Packages of the extras in pyproject.toml, by the names under which they are imported.
EXTRAS = {
    "pytorch_lightning": "train", "lightning_fabric": "train", "torchmetrics": "train",
    "torchvision": "train", "PIL": "train", "sklearn": "train", "numpy": "train", "tqdm": "train",
    "matplotlib": "train", "rich": "train", "psutil": "bench",
}  # fmt: skip
# What the user can put right; any other OSError is our bug and keeps its traceback.
USERS_OS_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO,
}  # fmt: skip
USAGE_STATUS = 2


class Parser(argparse.ArgumentParser):
    """argparse, without the usage text before an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_STATUS, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: ``sys.argv[1:]``); the exit status.

    >>> main(["info", "--nonsense"])
    Traceback (most recent call last):
        ...
    SystemExit: 2
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = _parser(argv[0] if argv else None)
        args = parser.parse_args(argv)
        status: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
        return status
    except UsageError as error:
        return _fail(one_line(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        return _fail(
            f"{argv[0]} needs the package {package}; install the extra in the source folder: "
            f"pip install --no-build-isolation '.[{extra}]'"
        )
    except OSError as error:
        if error.errno not in USERS_OS_ERRORS:
            raise
        file = f"{error.filename}: " if error.filename else ""
        return _fail(f"{file}{error.strerror}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _fail(message: str) -> int:
    print(f"dlfast: error: {message}", file=sys.stderr)
    return USAGE_STATUS


def _parser(asked: str | None) -> Parser:
    import dlfast

    parser = Parser(prog="dlfast", description=dlfast.__doc__)
    parser.add_argument("--version", action="version", version=f"dlfast {dlfast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == asked:
            importlib.import_module(module).add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
