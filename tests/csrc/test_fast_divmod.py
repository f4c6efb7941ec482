"""Division by multiplication (csrc/core/fast_divmod.h), compiled for the host: the code the kernels run."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include "core/fast_divmod.h"

// Every numerator next to a multiple of the divisor and next to both ends, where rounding could go wrong.
static bool holds(uint32_t d) {
  const dlfast::FastDivmod<uint32_t> divmod(d);
  const uint32_t end = 0x7fffffffu;
  const uint64_t step = d * ((end / d) / 5000 + uint64_t{1});
  for (uint64_t base = 0; base <= end; base += step) {
    for (int64_t n = static_cast<int64_t>(base) - 2; n <= static_cast<int64_t>(base) + 2; ++n) {
      if (n < 0 || n > end) continue;
      const auto r = divmod.divide(static_cast<uint32_t>(n));
      if (r.quotient == n / d && r.remainder == n % d) continue;
      std::printf("%lld / %u\n", static_cast<long long>(n), d);
      return false;
    }
  }
  return divmod.quotient(end) == end / d && divmod.quotient(end - 1) == (end - 1) / d;
}

int main() {
  for (uint32_t d = 1; d < 3000; ++d) {
    if (!holds(d)) return 1;
  }
  for (int shift = 8; shift < 31; ++shift) {
    for (uint32_t d = (1u << shift) - 3; d <= (1u << shift) + 3; ++d) {
      if (!holds(d)) return 1;
    }
  }
  if (!holds(0x7fffffffu) || !holds(0x7ffffffeu) || !holds(0x55555555u)) return 1;
  const uint64_t n = uint64_t{1} << 40;
  const auto wide = dlfast::FastDivmod<uint64_t>(10007).divide(n);
  return wide.quotient == n / 10007 && wide.remainder == n % 10007 ? 0 : 1;
}
"""


def test_fast_divmod(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "divmod.cpp"
    source.write_text(PROGRAM)
    program = tmp_path / "divider"
    subprocess.run([compiler, "-std=c++20", "-O2", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
