"""Everything that only a GPU can tell, in under ten minutes, as one report: `make gpu-check`.

usage: python -m tools.cuda.gpu_check [--only tests sanitizer benchmark] [--select EXPRESSION] [--out FILE]

Runs the CUDA tests; a sample of them under each tool of compute-sanitizer; and the benchmark against PyTorch with
cudnn.benchmark in channels_last, torch.compile with max-autotune, torch's fused optimizers and, where it is
installed, Apex. The report is JSON with the facts of the device, what was run, how it ended and what was measured;
it is written whole when all is done, also if something failed, and not at all if this is interrupted.

The status is 0 if everything passed, 1 if something failed, 2 if there is no GPU or no extension to check.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import cuda_build
import dlfast.info
from dlfast._native import native
from dlfast.app.files import write_whole

ROOT = Path(__file__).resolve().parents[2]

STAGES = ("tests", "sanitizer", "benchmark")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds; together below ten minutes, with the time to collect tests.
LIMITS = {"tests": 150, "sanitizer": 55, "benchmark": 190}
BENCHMARK_BEGINS = 140  # no further problem after that
PER_FILE = 8  # tests of each file that run under the sanitizers, which are slow
NOT_KERNELS = ("test_gpu_check.py", "test_cuda_failure.py", "test_traffic.py", "test_heuristics_cuda.py")
SANITIZER_FAILED = 86  # so that its findings are told from failing tests
TAIL = 4000


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    limit: float
    environment: dict[str, str]


@dataclass(frozen=True)
class Result:
    """How a stage ended: "passed", "failed", "timed out" or "not run", and why."""

    name: str
    command: str
    outcome: str
    seconds: float
    reason: str
    tail: str  # of its output


def emulated() -> bool:
    return torch.cuda.is_available() and "emulator" in torch.cuda.get_device_name()


def lacking(stages: list[str]) -> str | None:
    """Why nothing can be checked here, or None."""
    if native.module is None:
        return f"the extension is not loaded ({native.reason})"
    if not native.build.get("cuda"):
        return "the extension was built without CUDA; build it where nvcc is, or with the extra cuda-build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if emulated() and stages != ["tests"]:
        return "this is the emulator, which runs --only tests"
    return None


def sanitizer() -> str | None:
    """compute-sanitizer from PATH, the toolkit, or the wheel of the extra dev."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [Path(home) / "bin", *(folder / "bin" for folder in cuda_build.wheel_folders())]
    return shutil.which("compute-sanitizer") or next(
        (str(place / "compute-sanitizer") for place in places if (place / "compute-sanitizer").exists()), None
    )


def collected() -> list[str]:
    """The names of all tests that the sanitizers could run."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "cuda and not gpu_only", "tests"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"gpu_check: the tests cannot be collected:\n{done.stdout[-TAIL:]}{done.stderr[-TAIL:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def sample(names: list[str]) -> list[str]:
    """Some tests of each file that runs kernels, spread over the file: so over its dtypes, formats and windows."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("::")[0], []).append(name)
    chosen = []
    for file, tests in files.items():
        if not file.endswith(NOT_KERNELS):
            chosen += [tests[n * len(tests) // PER_FILE] for n in range(PER_FILE)] if len(tests) > PER_FILE else tests
    return chosen


def stages(wanted: list[str], select: str | None, folder: Path) -> list[Stage]:
    """What is run, in order; the benchmark leaves its figures in `folder`."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = []
    if "tests" in wanted:
        parallel = ["-n", "4"] if (os.cpu_count() or 1) >= 4 and not select else []
        chosen = ["-k", select] if select else []
        command = [*pytest, *parallel, "-m", "cuda or gpu_only", *chosen, "tests"]
        found.append(Stage("tests", command, LIMITS["tests"], {}))
    if "sanitizer" in wanted:
        chosen = ["-m", "cuda and not gpu_only", "-k", select, "tests"] if select else sample(collected())
        for tool in TOOLS:
            command = [
                sanitizer() or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FAILED),
                "--target-processes", "application-only", "--kernel-name", "kns=dlfast",
                *pytest, "-x", *chosen,
            ]  # fmt: skip
            # Without torch's pools every tensor is an allocation of its own, whose bounds can be checked.
            found.append(Stage(tool, command, LIMITS["sanitizer"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    if "benchmark" in wanted:
        command = [
            sys.executable, "-m", "dlfast", "bench", "gpu", "--rounds", "10", "--at-most", str(BENCHMARK_BEGINS),
            "--out", str(folder),
        ]  # fmt: skip
        found.append(Stage("benchmark", command, LIMITS["benchmark"], {}))
    return found


def run(stage: Stage) -> Result:
    print(f"{stage.name} ...", flush=True)
    shown = " ".join(stage.command)
    start = time.monotonic()
    if shutil.which(stage.command[0]) is None:
        missing = f"no {stage.command[0]}: install a CUDA toolkit, or the extra dev"
        return Result(stage.name, shown, "not run", 0.0, missing, "")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **stage.environment}
    # A session of its own, so that what it has started ends with it.
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=stage.limit)
        outcome, reason = ended(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        outcome, reason = "timed out", f"its limit is {stage.limit:g} s"
    except BaseException:
        os.killpg(process.pid, 9)
        process.communicate()
        raise
    return Result(stage.name, shown, outcome, time.monotonic() - start, reason, output[-TAIL:])


def ended(status: int, output: str) -> tuple[str, str]:
    """Outcome and reason of a command that has ended by itself."""
    lines = output.strip().splitlines()
    last = lines[-1] if lines else "no output"
    if status == 0 and re.search(r"\b\d+ skipped", last) and " passed" not in last:
        return "failed", f"every test was skipped: {last}"
    if status == SANITIZER_FAILED:
        summary = [line for line in lines if "ERROR SUMMARY" in line]
        return "failed", summary[-1] if summary else last
    return ("passed", last) if status == 0 else ("failed", f"status {status}: {last}")


def device_facts() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, object] = {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory, bytes": properties.total_memory,
        "cuDNN": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
    if shutil.which("nvidia-smi"):
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu,utilization.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        said = subprocess.run(command, capture_output=True, text=True)
        facts |= dict(zip(query.split(","), said.stdout.strip().split(", "), strict=False))
    return facts


def report(results: list[Result], folder: Path, seconds: float) -> bytes:
    measured = folder / "gpu.json"
    content = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_facts(),
        "installation": dlfast.info.facts(),
        "seconds": round(seconds, 1),
        "stages": [asdict(result) for result in results],
        "benchmark": json.loads(measured.read_text()) if measured.exists() else None,
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="(default: all)")
    parser.add_argument("--select", metavar="EXPRESSION", help="tests to run, as pytest's -k has it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: bench/gpu-check-NAME.json)")
    args = parser.parse_args()
    if why := lacking(args.only):
        print(f"gpu_check: nothing to check here: {why}", file=sys.stderr)
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    out = args.out or ROOT / "bench" / f"gpu-check-{slug}.json"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = [run(stage) for stage in stages(args.only, args.select, Path(folder))]
        content = report(results, Path(folder), time.monotonic() - start)
    write_whole(out, content)
    for result in results:
        print(f"{result.name}: {result.outcome} in {result.seconds:.0f} s: {result.reason}")
    print(f"written: {out}")
    return 0 if all(result.outcome == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
