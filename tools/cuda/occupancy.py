"""Blocks per multiprocessor by NVIDIA's own cuda_occupancy.h, compiled with g++: no GPU is asked."""

import subprocess
from pathlib import Path

# Threads and shared memory per multiprocessor, shared memory per block with opt-in, and what the driver takes
# of it per block, in KiB; from the compute capability tables of the CUDA C++ Programming Guide.
DEVICES = {
    75: (1024, 64, 64, 0),
    80: (2048, 164, 163, 1),
    86: (1536, 100, 99, 1),
    89: (1536, 100, 99, 1),
    90: (2048, 228, 227, 1),
    100: (2048, 228, 227, 1),
    120: (1536, 100, 99, 1),
}

PROGRAM = r"""
#include <cuda_occupancy.h>
#include <cstdio>

int main() {
  int arch, max_threads, registers, threads;
  long per_sm, optin, reserved, fixed, dynamic;
  while (std::scanf("%d %d %ld %ld %ld %d %ld %ld %d", &arch, &max_threads, &per_sm, &optin, &reserved,
                    &registers, &fixed, &dynamic, &threads) == 9) {
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = max_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = per_sm << 10;
    device.sharedMemPerBlockOptin = optin << 10;
    device.reservedSharedMemPerBlock = reserved << 10;
    device.numSms = 1;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = threads;
    function.numRegs = registers;
    function.sharedSizeBytes = fixed;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = dynamic;
    function.numBlockBarriers = 1;
    const cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, dynamic);
    if (error != CUDA_OCC_SUCCESS) return 1 + error;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""

# (arch, registers, static shared memory, dynamic shared memory, threads of a block)
Launch = tuple[int, int, int, int, int]


def blocks_per_sm(launches: list[Launch], cuda_home: Path, build: Path) -> list[int]:
    """How many blocks of each launch one multiprocessor holds at a time."""
    build.mkdir(parents=True, exist_ok=True)
    source, program = build / "occupancy.cpp", build / "occupancy"
    source.write_text(PROGRAM)
    # What the toolkit of wheels calls its headers' folder is also called include.
    compiler = ["g++", "-O1", "-w", "-isystem", str(cuda_home / "include"), str(source), "-o", str(program)]
    subprocess.run(compiler, check=True)
    lines = []
    for arch, registers, static, dynamic, threads in launches:
        lines.append(" ".join(map(str, (arch, *DEVICES[arch], registers, static, dynamic, threads))))
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def occupancy(arch: int, blocks: int, threads: int) -> float:
    """The part of a multiprocessor's warps that these blocks fill."""
    return blocks * threads / DEVICES[arch][0]
