"""Whether there is anything to compare with the reference."""

import pytest

from dlfast._native import native

needs_native = pytest.mark.skipif(native.module is None, reason="needs the compiled extension")
