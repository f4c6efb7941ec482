"""``dlfast bench``: choose what to measure, measure it, print and write the results."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from dlfast._native import native
from dlfast.app.bench import accuracy, fused, gpu, layers, optim, overhead, peers, problems, protocol, report, traffic
from dlfast.app.errors import UsageError
from dlfast.app.files import write_whole
from dlfast.choice import machine_speed
from dlfast.models import NETWORKS

TARGETS = [*NETWORKS, "layers", *optim.TARGETS, "peers", "overhead", "accuracy", "bytes", "gpu", "fuse", *fused.MODELS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dlfast bench``."""
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", choices=[*TARGETS, []],
        help=f"any of {', '.join(TARGETS)}; fuse is all models of torchvision (default: the five networks)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="timed calls of each (default: 30)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of the networks (default: their articles')")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: torch's own choice)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(default: auto)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument(
        "--at-most", type=float, metavar="SECONDS", help="begin no further problem after that (default: no limit)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="DIR", help="(default: bench)")


def run(args: argparse.Namespace) -> int:
    """``dlfast bench`` with parsed options; the exit status."""
    for option in ("rounds", "batch_size", "threads"):
        value = getattr(args, option)
        least = 2 if option == "rounds" else 1  # quartiles need two
        if value is not None and value < least:
            raise UsageError(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    for alone in ("accuracy", "bytes"):
        if alone in args.targets and args.targets != [alone]:
            raise UsageError(f"bench {alone} measures no time and takes no other target beside it")
    if args.targets == ["bytes"]:
        return _bytes(args.out)
    device = _device(args.device)
    if "layers" in args.targets and native.module is None:
        raise UsageError(f"bench layers measures the compiled operators, which are not available: {native.reason}")
    if "peers" in args.targets and not peers.installed(device):
        known = ", ".join(dict.fromkeys(peer.label for peer in peers.PEERS if device in peer.devices))
        raise UsageError(f"bench peers compares with {known} on the {device}, and none of them is installed")
    if "gpu" in args.targets and device != "cuda":
        raise UsageError("bench gpu needs a CUDA device, and torch sees none")
    for package in ("rich", "matplotlib"):  # say at once, not after minutes of measuring, that one is missing
        importlib.import_module(package)
    protocol.set_threads(args.threads)
    facts = protocol.machine()
    if args.targets == ["accuracy"]:
        return _accuracy(args.out, facts)
    rows, ratios, points = [], [], []
    notes: list[str] = []
    roofline = None
    for problem in _in_time(_problems(args, device), args.at_most, notes):
        print(f"{problem.name} ...", flush=True)
        more_rows, more_ratios = protocol.measure(problem, args.rounds)
        if problem.work:
            roofline = roofline or _roofline()
            more_ratios, more_points = protocol.under_roofline(problem, more_rows, more_ratios, roofline)
            points += more_points
        rows += more_rows
        ratios += more_ratios
        notes += [f"{problem.name}: {note}" for note in problem.notes]
        # Beyond a few compilations of the same code torch.compile falls back to eager without a word.
        torch.compiler.reset()
        if problem.moved:
            notes += protocol.bandwidths(problem, more_rows, optim.copy_bandwidth(device))
    facts["load average after"] = protocol.load_average()
    result = protocol.Report(facts, rows, ratios, notes, points, roofline)
    report.print_tables(result)
    name = "-".join(args.targets) or "networks"
    write_whole(args.out / f"{name}.json", report.to_json(result))
    write_whole(args.out / f"{name}.png", report.figure(result))
    print(f"written: {args.out / name}.json and .png")
    return 0


def _accuracy(out: Path, facts: dict[str, str]) -> int:
    errors = list(accuracy.measure())
    report.print_errors(errors)
    text = json.dumps({"machine": facts, "errors": [asdict(error) for error in errors]}, indent=1) + "\n"
    write_whole(out / "accuracy.json", text.encode())
    print(f"written: {out / 'accuracy.json'}")
    return 0


def _bytes(out: Path) -> int:
    text = traffic.markdown(item=2, dtype="float16")
    print(text)
    write_whole(out / "bytes.json", (json.dumps(traffic.as_dict(item=2), indent=1) + "\n").encode())
    write_whole(out / "bytes.md", text.encode())
    print(f"written: {out / 'bytes.json'} and .md")
    return 0


def _in_time(every: Iterator[problems.Problem], at_most: float | None, notes: list[str]) -> Iterator[problems.Problem]:
    """Problems are made, and compiled, only when their turn comes."""
    start = time.monotonic()
    for problem in every:
        yield problem
        if at_most is not None and time.monotonic() - start > at_most:
            notes.append(f"stopped after {at_most:g} s: what comes after {problem.name} was not measured")
            return


def _roofline() -> protocol.Roofline:
    speed = machine_speed()
    return protocol.Roofline(speed.flops, speed.bandwidth)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _problems(args: argparse.Namespace, device: str) -> Iterator[problems.Problem]:
    torch.manual_seed(0)
    targets = args.targets or list(NETWORKS)
    compile = not args.no_compile
    yield from problems.networks([t for t in targets if t in NETWORKS], args.batch_size, compile, device)
    if "layers" in targets:
        yield from layers.problems(compile, device)
    models = list(fused.MODELS) if "fuse" in targets else [t for t in targets if t in fused.MODELS]
    yield from fused.models(models, args.batch_size, compile, device)
    yield from optim.problems(targets, device)
    if "peers" in targets:
        yield from peers.problems(optim.LISTS, device)
    if "overhead" in targets:
        yield from overhead.problems(device)
    if "gpu" in targets:
        yield from gpu.gpu_problems(compile)
