"""Which file may include what: the seams that keep kernels free of Torch, checked by their #include lines.

Each rule gives the includes a kind of file may have beside the C++ standard library; the first rule whose
pattern fits a file counts.
"""

import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
STANDARD = r"<[a-z_]+>"  # <vector>, <cstdint>
COMMON = r'"common/[a-z_0-9]+\.(h|cuh)"'
OWN = (
    r'"(conv_relu_pool|bn_relu_pool|optim)/(params|step|formats|relu_pool|norm|vectors|conv_\w+|cpu_\w+|launch\w*)\.h"'
)
KERNELS = r'"(conv_relu_pool|bn_relu_pool|optim)/(kernel|launch)_\w+\.cuh"'
CUDA_RUNTIME = r"<cuda_runtime(_api)?\.h>"

# (files, includes allowed beside the standard library)
RULES = [
    (r"common/portability\.h", [r"<cuda_\w+\.h>", COMMON]),
    (r"common/launch_check\.h", [r"<c10/cuda/CUDAException\.h>", r"<c10/util/Exception\.h>"]),
    (r"common/\w+\.h", [COMMON, r"<cuda_\w+\.h>"]),
    (r".*/(params|step|formats|norm|vectors|conv_\w+)\.h", [COMMON, OWN]),
    (
        r".*/cpu_\w+\.(h|cpp)",
        [COMMON, OWN, r"<immintrin\.h>", r"<omp\.h>", r"<ATen/Parallel\.h>", r"<c10/util/(BFloat16|Half)\.h>"],
    ),
    (r".*/kernel_\w+\.cuh", [COMMON, OWN, KERNELS]),
    (
        r".*/launch\w*\.cuh?",
        [COMMON, OWN, KERNELS, CUDA_RUNTIME, r"<c10/cuda/\w+\.h>", r"<c10/util/(Exception|StringUtil|Type)\.h>"],
    ),
    (r".*/launch\w*\.h", [COMMON, OWN, KERNELS, CUDA_RUNTIME]),
    # The Torch side: anything but a kernel body.
    (
        r"(checks\.h|library\.cpp|.*/(op\w*|autograd|plan\w*|measure\w*|speed|relu_pool|tensors_state)\.(h|cpp))",
        [r"<[\w/.]+>", r'"(?!.*kernel_)[\w/.]+"'],
    ),
]


def violations(path: Path) -> list[str]:
    name = path.relative_to(CSRC).as_posix()
    rule = next((allowed for pattern, allowed in RULES if re.fullmatch(pattern, name)), None)
    if rule is None:
        return [f"csrc/{name}: no rule for this file in tools/seams.py"]
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        include = re.match(r"\s*#\s*include\s+(\S+)", line)
        if include and not any(re.fullmatch(p, include[1]) for p in [STANDARD, *rule]):
            found.append(f"csrc/{name}:{number}: may not include {include[1]}")
        if "<<<" in line and not path.name.startswith("launch"):
            found.append(f"csrc/{name}:{number}: launches belong in launch*.cu")
    # Every launch has its error raised, with its name: see common/launch_check.h.
    text = path.read_text()
    checked = re.search(r"\b(check_launch|launch_conv)\b", text)
    if path.name.startswith("launch") and "<<<" in text and not checked:
        found.append(f"csrc/{name}: launches a kernel without check_launch")
    if "C10_CUDA_KERNEL_LAUNCH_CHECK" in text and name != "common/launch_check.h":
        found.append(f"csrc/{name}: check_launch names the kernel, C10_CUDA_KERNEL_LAUNCH_CHECK does not")
    return found


def main() -> int:
    files = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
    found = [line for path in files for line in violations(path)]
    print("\n".join(found) if found else f"include seams hold in {len(files)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
