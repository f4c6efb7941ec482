"""A run that was stopped anywhere and resumed ends as one that was not, and never leaves half a file."""

import dataclasses
import errno
import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from dlfast.app import files
from dlfast.app.cli import main
from dlfast.app.errors import UsageError
from dlfast.app.lightning import Training
from dlfast.app.train import fit
from tests.support.program import assert_same_run, history, python, rows, small


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The steps are too small for two, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, fit(small(out))


class Crash(BaseException):
    pass


def stop_at_step(monkeypatch, number, error):
    """Raise in the `number`-th training step from now on."""
    calls = []
    original = Training.training_step

    def step(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == number:
            raise error
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Training, "training_step", step)


def copy_run(out, target):
    target.mkdir()
    for path in out.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("step", [1, 20, 21, 30, 60])
def test_stopped_in_a_step(whole, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at_step(patch, step, Crash())
        with pytest.raises(Crash):
            fit(small(out))
    done = (step - 1) // 20
    assert (out / "last.ckpt").exists() == (done > 0)
    assert not (out / "result.json").exists()
    result = fit(small(out, resume=True))
    assert_same_run(out, whole[0])
    assert history(result) == history(whole[1])
    assert result.test_accuracy == whole[1].test_accuracy
    assert result.step_losses == whole[1].step_losses[20 * done :]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7])
def test_stopped_in_a_write(whole, tmp_path, monkeypatch, number, before):
    """`number` counts the files of a run: config, best, last, metrics, curves, best, last, ..."""
    out = tmp_path / "out"
    calls = []
    replace = os.replace

    def stop(source, target):
        calls.append(target)
        if len(calls) == number and before:
            raise Crash
        replace(source, target)
        if len(calls) == number:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", stop)
        with pytest.raises(Crash):
            fit(small(out))
    if number == 1 and before:
        with pytest.raises(UsageError, match="there is no run in"):
            fit(small(out, resume=True))
        fit(small(out))
    else:
        fit(small(out, resume=True))
    assert_same_run(out, whole[0])


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tests.support.program import small
from pathlib import Path
from dlfast.app import files
from dlfast.app.lightning import Training
from dlfast.app.train import fit

left = {count}
def kill_at_last(original):
    def wrapper(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return wrapper

if {where!r} == "step":
    Training.training_step = kill_at_last(Training.training_step)
else:
    files.os.replace = kill_at_last(os.replace)
fit(small(Path({out!r})))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), [("step", 27), ("write", 7)])
def test_killed(whole, tmp_path, where, count):
    """SIGKILL in the middle of the second epoch, and between the two halves of writing its last.ckpt."""
    out = tmp_path / "out"
    script = KILLED.format(out=str(out), where=where, count=count)
    assert python("-c", script).returncode == -signal.SIGKILL
    assert len(rows(out)) == 1
    leftovers = [path.name for path in out.iterdir() if path.suffix == ".tmp"]
    assert len(leftovers) == (where == "write")
    fit(small(out, resume=True))
    assert_same_run(out, whole[0])


INTERRUPTED = """
import os, sys
from dlfast.app.lightning import Training
from dlfast.app.cli import main

original, calls = Training.training_step, []
def step(*args):
    calls.append(1)
    if len(calls) == 30:
        os.kill(os.getpid(), {signal})
    return original(*args)
Training.training_step = step
sys.exit(main(["train", "mnistnet", "--input-size", "8", "--epochs", "3", "--out", {out!r}]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_say_how_to_go_on(whole, tmp_path, number):
    out = tmp_path / "a run"
    done = python("-c", INTERRUPTED.format(signal=int(number), out=str(out)))
    assert done.returncode == 128 + number
    assert done.stderr == f"\ninterrupted; go on with: dlfast train mnistnet --out '{out}' --resume\n"
    assert "epoch 1/3" in done.stdout
    assert main(["train", "mnistnet", "--out", str(out), "--resume"]) == 0
    assert_same_run(out, whole[0])


def test_interrupt_leaves_ctrl_c_working(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fit(small(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler


def test_finished_run_says_so(whole, tmp_path, capsys):
    out = copy_run(whole[0], tmp_path / "out")
    result = fit(small(out, resume=True, progress=True))
    assert "is finished: it has its 3 epochs" in capsys.readouterr().out
    assert result.step_losses == []
    assert result.test_accuracy == whole[1].test_accuracy
    assert_same_run(out, whole[0])


def test_more_epochs_go_on_from_there(whole, tmp_path):
    out = tmp_path / "out"
    fit(small(out, epochs=1))
    fit(small(out, epochs=3, resume=True))
    assert_same_run(out, whole[0])
    with pytest.raises(UsageError, match=r"--epochs is 3 in .* and can only grow, got 2"):
        fit(small(out, epochs=2, resume=True))


def test_options_need_no_repeating(whole, tmp_path):
    out = copy_run(whole[0], tmp_path / "out")
    config = dataclasses.replace(small(out, resume=True), epochs=None, input_size=None)
    assert fit(config).test_accuracy == whole[1].test_accuracy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "stacked"}, "the network is mnistnet in .*, not stacked"),
        ({"data": "mnist"}, "--data is digits in .*, not mnist"),
        ({"backend": "torch"}, "--backend is fused in .*, not torch"),
        ({"optimizer": "sgd"}, "--optimizer is adam"),
        ({"lr": 0.5}, "--lr is 0.001"),
        ({"batch_size": 3}, "--batch-size is 64"),
        ({"seed": 1}, "--seed is 0"),
        ({"input_size": (9, 8)}, "--input-size is 8x8 in .*, not 9x8"),
        ({"weight_decay": 0.5}, "--weight-decay is 0"),
    ],
)
def test_other_settings_are_refused(whole, options, message):
    before = (whole[0] / "last.ckpt").read_bytes()
    with pytest.raises(UsageError, match=message):
        fit(small(whole[0], resume=True, **options))
    assert (whole[0] / "last.ckpt").read_bytes() == before


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "corrupt checkpoint"),
        (lambda path: path.write_bytes(b"something else"), "corrupt checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(Evil())), "corrupt checkpoint"),
        (truncate, "corrupt checkpoint"),
        (flip, "corrupt checkpoint"),
        (lambda path: torch.save({"state_dict": {}}, path), "not a checkpoint of this version"),
        (lambda path: torch.save([1], path), "not a checkpoint of this version"),
    ],
)
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_damaged_checkpoints_are_named(whole, tmp_path, monkeypatch, name, damage, message):
    monkeypatch.chdir(tmp_path)
    out = copy_run(whole[0], tmp_path / "out")
    damage(out / name)
    with pytest.raises(UsageError, match=f"{name}: {message}") as caught:
        fit(small(out, resume=True))
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_missing_best_is_named(whole, tmp_path):
    out = copy_run(whole[0], tmp_path / "out")
    (out / "best.ckpt").unlink()
    with pytest.raises(UsageError, match=r"best.ckpt: no such checkpoint"):
        fit(small(out, resume=True))


def test_checkpoint_of_another_run(whole, tmp_path):
    fit(small(tmp_path / "other", epochs=1, seed=1))
    out = copy_run(whole[0], tmp_path / "out")
    (out / "last.ckpt").write_bytes((tmp_path / "other" / "last.ckpt").read_bytes())
    with pytest.raises(UsageError, match=r"last.ckpt: is of another run \(seed 1, not 0\)"):
        fit(small(out, resume=True))


def test_other_images_than_before(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("dlfast.app.data._fingerprint", lambda *tensors: "another")
    with pytest.raises(UsageError, match="made from other images"):
        fit(small(copy_run(whole[0], tmp_path / "out"), resume=True))


def unrevised(out):
    """The run as a version left it that recorded no revision."""
    values = json.loads((out / "config.json").read_text())
    del values["revision"]
    (out / "config.json").write_text(json.dumps(values))
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(out / name, weights_only=True)
        del checkpoint["dlfast"]["settings"]["revision"]
        torch.save(checkpoint, out / name)
    return out


def test_runs_of_before_that_mean_the_same_go_on(whole, tmp_path):
    out = tmp_path / "out"
    fit(small(out, epochs=1))
    fit(small(unrevised(out), epochs=3, resume=True))
    assert_same_run(out, whole[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "twoconv"}, "in which twoconv had no ReLU between its linear layers; start a new run"),
        ({"data": "folder", "data_dir": "photos"}, "in which folder ignored the EXIF orientation and transparency"),
    ],
)
def test_runs_of_before_that_meant_something_else_are_refused(whole, tmp_path, options, message):
    out = unrevised(copy_run(whole[0], tmp_path / "out"))
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | options))
    network = options.get("network", "mnistnet")
    with pytest.raises(UsageError, match=f"the run in {out} is of an earlier version, {message}"):
        fit(small(out, network=network, resume=True))


def test_runs_of_later_versions_are_refused(whole, tmp_path):
    out = copy_run(whole[0], tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | {"revision": values["revision"] + 1}))
    with pytest.raises(UsageError, match=r"config.json: not the settings of a run \(revision must be 1 to"):
        fit(small(out, resume=True))


def rename(folder):
    (folder / "dark").rename(folder / "zebra")  # now the other class comes first


def add_class(folder):
    (folder / "grey").mkdir()
    Image.new("L", (8, 8), 128).save(folder / "grey" / "0.png")


def add_image(folder):
    Image.new("L", (8, 8), 30).save(folder / "dark" / "new.png")


@pytest.mark.parametrize("change", [rename, add_class, add_image])
def test_other_files_than_before(tmp_path, change):
    for name, value in (("dark", 20), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("L", (8, 8), value + index).save(tmp_path / "photos" / name / f"{index}.png")
    options = {"data": "folder", "data_dir": tmp_path / "photos"}
    fit(small(tmp_path / "out", epochs=1, **options))
    fit(small(tmp_path / "out", epochs=2, resume=True, **options))
    change(tmp_path / "photos")
    with pytest.raises(UsageError, match="made from other images"):
        fit(small(tmp_path / "out", epochs=3, resume=True, **options))


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"network": 3}'])
def test_damaged_settings_are_named(whole, tmp_path, content):
    out = copy_run(whole[0], tmp_path / "out")
    (out / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config.json: not the settings of a run"):
        fit(small(out, resume=True))


def test_settings_of_the_wrong_kind_are_named(whole, tmp_path):
    out = copy_run(whole[0], tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | {"lr": "fast"}))
    with pytest.raises(UsageError, match=r"config.json: not the settings of a run"):
        fit(small(out, resume=True))


def full_disk(monkeypatch, number):
    """The `number`-th file finds no space left."""
    calls = []
    fsync = os.fsync

    def fail(descriptor):
        calls.append(descriptor)
        # Each file is synchronised, and its folder after it.
        if len(calls) == 2 * number - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fail)


def test_full_disk_leaves_the_last_whole_state(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["train", "mnistnet", "--input-size", "8", "--epochs", "3", "--out", str(out)]
    with monkeypatch.context() as patch:
        full_disk(patch, 7)
        assert main(command) == 2
    assert capsys.readouterr().err == f"dlfast: error: {out / 'last.ckpt'}: No space left on device\n"
    assert len(rows(out)) == 1
    assert main([*command, "--resume"]) == 0
    assert_same_run(out, whole[0])


def test_write_whole_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    target = tmp_path / "file"
    files.write_whole(target, b"old")
    with monkeypatch.context() as patch:
        full_disk(patch, 1)
        with pytest.raises(OSError, match="No space left") as caught:
            files.write_whole(target, b"new")
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask
