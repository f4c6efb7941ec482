"""What is kept of measurements for other processes: in files, without a GPU."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import warnings
from pathlib import Path

import pytest

import dlfast
from dlfast import _measurements as measurements
from dlfast._measurements import Keeper, cache_dir, file_for, read, write
from dlfast._native import native
from tests.support.native import built_for_cuda

GPU = {"device": "NVIDIA H100 80GB HBM3", "driver": 13000, "runtime": 13000, "torch": "2.14.1", "dlfast": "0.1.0"}
FOUND = {(-1, 5, 3): [1.25e-4, 3e-4], (2, 1, 64): [1e-5, math.inf, 0.1 + 0.2, 5e-6, 7e-5]}


class Measured:
    """As much of the compiled module as a keeper asks for."""

    def __init__(self, found):
        self.found = dict(found)

    def measurements(self, device):
        return [(list(key), list(seconds)) for key, seconds in self.found.items()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DLFAST_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keeper_of(found, identity=GPU):
    return Keeper(Measured(found), lambda device: identity)


def as_found(entries):
    return {tuple(key): seconds for key, seconds in entries}


def test_what_one_process_saves_another_loads(folder):
    first = keeper_of({})
    assert first.load(0) == []
    first._module.found = dict(FOUND)
    first.save_all()
    assert as_found(keeper_of({}).load(0)) == FOUND
    assert [path.name for path in folder.iterdir()] == ["NVIDIA-H100-80GB-HBM3.json"]


def test_nothing_new_writes_nothing(folder):
    keeper_of(FOUND).save(0)
    path = file_for(folder, GPU)
    path.chmod(0o644)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    again = keeper_of({})
    again._module.found = as_found(again.load(0))
    again.save_all()
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize("part", ["driver", "runtime", "torch", "dlfast"])
def test_what_another_version_measured_is_no_longer_true(folder, part):
    keeper_of(FOUND).save(0)
    now = {**GPU, part: "another"}
    keeper = keeper_of({}, now)
    assert keeper.load(0) == []
    keeper._module.found = {(1,): [1.0, 2.0]}
    keeper.save(0)
    assert read(file_for(folder, now), now) == {(1,): [1.0, 2.0]}
    assert keeper_of({}).load(0) == []  # the file is of the other one now


def test_gpus_have_their_own_files(folder):
    other = {**GPU, "device": "NVIDIA A100"}
    keeper_of(FOUND).save(0)
    keeper_of({(1,): [1.0, 2.0]}, other).save(0)
    assert as_found(keeper_of({}).load(0)) == FOUND
    assert as_found(keeper_of({}, other).load(0)) == {(1,): [1.0, 2.0]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("0.000125", "0.000725"),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[1, 2]",
        lambda text: "[" * 100000,
        lambda text: text.replace('"entries"', '"others"'),
        lambda text: "\udcff",
    ],
    ids=["empty", "cut", "another number", "another format", "a list", "deep", "no entries", "no text"],
)
def test_a_damaged_file_is_none_and_written_anew(folder, damage):
    write(file_for(folder, GPU), GPU, FOUND)
    path = file_for(folder, GPU)
    text = path.read_text()
    path.write_bytes(damage(text).encode(errors="surrogateescape"))
    assert path.read_bytes() != text.encode()
    keeper = keeper_of({})
    assert keeper.load(0) == []
    keeper._module.found = {(1,): [1.0, 2.0]}
    keeper.save(0)
    assert json.loads(path.read_text())["entries"] == [[[1], [1.0, 2.0]]]


def test_two_that_ran_at_once_keep_what_both_found(folder):
    first, second = keeper_of({}), keeper_of({})
    first.load(0), second.load(0)
    first._module.found, second._module.found = {(1,): [1.0, 2.0]}, {(2,): [3.0, 4.0]}
    first.save(0), second.save(0)
    assert as_found(keeper_of({}).load(0)) == {(1,): [1.0, 2.0], (2,): [3.0, 4.0]}


def write_often(path, first):
    for i in itertools.count(first, 2):
        write(Path(path), GPU, {(i, n): [float(i), 1.0] for n in range(500)})


def test_a_file_is_whole_while_two_write(folder):
    path = file_for(folder, GPU)
    write(path, GPU, FOUND)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(str(path), first), daemon=True) for first in (0, 1)]
    for writer in writers:
        writer.start()
    seen = set()
    try:
        while not {0, 1} <= {i % 2 for i in seen} or len(seen) < 20:
            assert all(writer.is_alive() for writer in writers)
            found = read(path, GPU)
            assert found
            if found != FOUND:
                assert len(found) == 500
                seen |= {key[0] for key in found}
    finally:
        for writer in writers:
            writer.terminate()
            writer.join()


def test_files_do_not_grow_for_ever(folder, monkeypatch):
    monkeypatch.setattr(measurements, "MOST", 3)
    keeper = keeper_of({(i,): [1.0, 2.0] for i in range(3)})
    keeper.save(0)
    keeper._module.found = {(i,): [1.0, 2.0] for i in range(2, 5)} | {(9,): [1.0, 2.0]}
    keeper.save(0)
    assert set(as_found(keeper_of({}).load(0))) == {(3,), (4,), (9,)}


def test_an_empty_name_turns_it_off(folder, monkeypatch):
    keeper_of(FOUND).save(0)
    before = file_for(folder, GPU).read_bytes()
    monkeypatch.setenv("DLFAST_CACHE_DIR", "")
    keeper = keeper_of({})
    assert keeper.load(0) == []
    keeper._module.found = {(1,): [1.0, 2.0]}
    keeper.save_all()
    assert file_for(folder, GPU).read_bytes() == before
    assert len(list(folder.iterdir())) == 1


def test_where_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DLFAST_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "dlfast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "dlfast"
    monkeypatch.setenv("DLFAST_CACHE_DIR", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("DLFAST_CACHE_DIR", "")
    assert cache_dir() is None


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLFAST_CACHE_DIR", str(tmp_path / "file"))
    keeper = keeper_of({})
    assert keeper.load(0) == []
    keeper._module.found = {(1,): [1.0, 2.0]}
    with pytest.warns(RuntimeWarning, match="DLFAST_CACHE_DIR"):
        keeper.save(0)
    keeper._module.found[2,] = [1.0, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keeper.save(0)


@built_for_cuda
def test_the_operators_save_what_is_new(folder):
    """They call the keeper after as many as measure_cuda.h says; a device that is not there will do."""
    module, device = native.module, 7
    keeper = Keeper(module, lambda index: {**GPU, "device": f"device {index}"})
    module.keep_measurements(load=keeper.load, save=keeper.save)
    try:
        for i in range(31):
            module.remember_measurement(device, [i, -i], [float(i), math.inf])
        assert not folder.exists()
        module.remember_measurement(device, [31, -31], [31.0, math.inf])
        saved = as_found(keeper.load(device))
        assert saved == {(i, -i): [float(i), math.inf] for i in range(32)}
    finally:
        module.forget_measurements()
        measurements.connect(dlfast.__version__)
    assert module.measurements(device) == []
