"""Marks of what only a build with the compiled extension can run."""

import pytest

from dlfast._native import native

needs_native = pytest.mark.skipif(native.module is None, reason="needs the compiled extension")
built_for_cuda = pytest.mark.skipif(not native.build.get("cuda"), reason="built without CUDA")
# Of a file of tests of CUDA kernels; where there is no device, conftest.py skips what has the mark cuda.
CUDA_KERNELS = [pytest.mark.cuda, built_for_cuda]
