"""What only a GPU can tell: `make gpu-check`, or `python -m tools.cuda.gpu_check [VERB ...]`.

    tests     the CUDA tests
    sanitize  compute-sanitizer over every kind of kernel, once
    blocks    the kernels of single blocks, under CUDA graphs
    networks  training steps as a user sees them
    steps     optimizer steps, and what calls cost the host
    graphs    graphed steps against plain ones: their losses and their time
    compile   torch.compile against eager and graphed steps

Each verb has a time of its own, and writes what it finds as it comes: VERB.json and VERB.log in a folder, with a
report.md of them all. A failure is said at once and the rest goes on. What has a result for this GPU, driver, torch
and commit is not run again, so that a verb that ran out of time goes on where it stopped.

The status is 0 if everything passed, 1 if something failed or has no result yet, 2 if there is nothing to check.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.cuda.gpu_check import device, report, verbs
from tools.cuda.gpu_check.process import ROOT
from tools.cuda.gpu_check.results import Results


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    wanted = [verb for verb in verbs.LIMITS if verb in args.verbs or not args.verbs]
    if why := device.lacking(wanted):
        print(f"gpu_check: nothing to check here: {why}", file=sys.stderr)
        return 2
    facts = device.facts()
    key = device.key_of(facts)
    every = {verb: Results(args.out / f"{verb}.json", key) for verb in verbs.LIMITS}
    complete = True
    for verb in wanted:
        results = every[verb]
        if results.ignored:
            say(f"{verb}: not counted: {results.ignored}")
        try:
            names = verbs.go(verb, results, limits(args)[verb], args.select, args.again, say)
        except RuntimeError as error:
            say(f"{verb}: {error}")
            complete = False
            continue
        finally:
            report.write(args.out, facts, {name: found for name, found in every.items() if found.items})
        complete = ended(verb, names, results) and complete
    say(f"written: {args.out / 'report.md'}")
    return 0 if complete else 1


def ended(verb: str, names: Sequence[str], results: Results) -> bool:
    """Say how the items `names` have ended; whether all of them have, and well."""
    outcomes = [results.items[name]["outcome"] for name in names if name in results.items]
    left = len(results.missing(names))
    say(f"{verb}: {report.counted(outcomes)}" + (f"; {left} of {len(names)} without a result" if left else ""))
    if not names:
        say(f"{verb}: nothing is selected")
    elif outcomes and set(outcomes) == {"skipped"}:
        say(f"{verb}: nothing but skipped, so nothing was checked")
    return not left and "failed" not in outcomes and "passed" in outcomes


def say(text: str) -> None:
    print(text, flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "verbs", nargs="*", metavar="VERB", choices=[*verbs.LIMITS, []], help="any of these (default: all)"
    )
    parser.add_argument(
        "--limit", action="append", type=limit, default=[], metavar="VERB=SECONDS",
        help=f"the time of a verb (default: {' '.join(f'{verb}={t:g}' for verb, t in verbs.LIMITS.items())})",
    )  # fmt: skip
    parser.add_argument(
        "--select", type=pattern, default="", metavar="PATTERN",
        help="only what a regular expression is found in the name of: tests, tools of compute-sanitizer, problems",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu", metavar="DIR", help="(default: bench/gpu)")
    return parser.parse_args(arguments)


def limits(args: argparse.Namespace) -> dict[str, float]:
    return {**verbs.LIMITS, **dict(args.limit)}


def limit(text: str) -> tuple[str, float]:
    """
    >>> limit("tests=60")
    ('tests', 60.0)
    """
    verb, _, seconds = text.partition("=")
    if verb not in verbs.LIMITS:
        raise argparse.ArgumentTypeError(f"must be VERB=SECONDS with a VERB of {', '.join(verbs.LIMITS)}, got {text!r}")
    try:
        number = float(seconds)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"SECONDS must be a positive number, got {text!r}")
    return verb, number


def pattern(text: str) -> Any:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None
    return text


if __name__ == "__main__":
    # As Ctrl-C, so that the processes of a verb end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
