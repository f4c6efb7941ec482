"""``dlfast info``: says what is there, and needs torch only."""

import dataclasses

import torch

import dlfast
from dlfast import info
from tests.support.program import python


def test_facts_name_versions_and_machine():
    facts = info.facts()
    assert facts["dlfast"] == dlfast.__version__
    assert facts["torch"] == torch.__version__
    assert str(torch.get_num_threads()) in facts["threads"]
    assert all(isinstance(value, str) and value for value in facts.values())


def test_missing_native_operators_have_a_reason(monkeypatch):
    missing = dataclasses.replace(info.native, module=None, reason="built against another torch")
    monkeypatch.setattr(info, "native", missing)
    facts = info.facts()
    assert facts["native operators"] == "not loaded: built against another torch"
    assert facts["SIMD level"] == "none (plain PyTorch)"
    assert facts["planned for"] == "this CPU"


def test_what_was_built_is_told(monkeypatch):
    class Module:
        @staticmethod
        def simd_level():
            return "avx2"

        @staticmethod
        def assumed_cpu():
            return "zen4"

    build = {
        "native": True,
        "cuda": True,
        "cuda_archs": "9.0+PTX",
        "cuda_version": "13.0",
        "torch_version": "2.x",
    }
    monkeypatch.setattr(info, "native", dataclasses.replace(info.native, module=Module, build=build))
    facts = info.facts()
    assert facts["compiled backends"] == "CPU, CUDA 13.0"
    assert facts["CUDA architectures"] == "9.0+PTX"
    assert facts["SIMD level"] == "avx2"
    assert facts["planned for"] == "zen4, by DLFAST_CPU_KIND"
    assert facts["native operators"] == "loaded"


def test_tools_that_are_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    facts = info.facts()
    assert facts["compiler here"] == "no no-such-compiler"
    assert facts["nvcc here"] == "none"


def test_as_module_without_the_extras():
    """The other packages are hidden from the process."""
    script = (
        "import sys, runpy\n"
        "for name in ('rich', 'pytorch_lightning', 'torchvision', 'sklearn', 'matplotlib', 'torchmetrics'):\n"
        "    sys.modules[name] = None\n"
        "runpy.run_module('dlfast.info', run_name='__main__')\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("dlfast ")
    assert "native operators" in done.stdout
