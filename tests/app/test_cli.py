"""The command line: errors of use are one line and status 2, bugs keep their traceback."""

import argparse
import errno
import json
import os
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

from dlfast.app import cli, demo
from dlfast.app.cli import COMMANDS, main
from dlfast.app.errors import UsageError
from dlfast.app.train import TrainConfig
from tests.support.program import dlfast, python

SMALL = ["train", "mnistnet", "--input-size", "8", "--epochs", "1"]

CURE = "install the extra in the source folder: pip install --no-build-isolation '.[train]'"


def fails(capsys, *arguments):
    """The one line that the command ends with, without its beginning."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert error.startswith("dlfast")
    return error.partition("error: ")[2].strip()


def broken_image(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8)).save(tmp_path / "images" / name / f"{index}.png")
            (tmp_path / "images" / name / f"{index}.png").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("train",), "the following arguments are required: NETWORK"),
        (("train", "resnet"), "invalid choice: 'resnet'"),
        ((*SMALL, "--data", "imagenet"), "invalid choice: 'imagenet'"),
        ((*SMALL, "--frobnicate"), "unrecognized arguments: --frobnicate"),
        ((*SMALL, "--epochs", "many"), "argument --epochs: invalid int value: 'many'"),
        ((*SMALL, "--epochs", "0"), "--epochs must be at least 1"),
        ((*SMALL, "--lr", "nan"), "--lr must be a positive number"),
        ((*SMALL, "--input-size", "3"), "mnistnet: input_size (3, 3) is too small"),
        ((*SMALL, "--input-size", "0"), "argument --input-size: invalid size value: '0'"),
        ((*SMALL, "--input-size", "4x4x4"), "argument --input-size: invalid size value"),
        ((*SMALL, "--data", "folder"), "--data folder needs --data-dir"),
        ((*SMALL, "--data", "folder", "--data-dir", "absent"), "absent: no such folder"),
        ((*SMALL, "--data", "folder", "--data-dir", "images"), ".png: not a readable image"),
        ((*SMALL, "--data-dir", "images"), "--data-dir: the digits"),
        ((*SMALL, "--resume"), "--resume: there is no run in runs/mnistnet-digits-fused"),
        ((*SMALL, "--out", "images/a/0.png"), "images/a/0.png is not a folder"),
        ((*SMALL, "--out", "images/a/0.png/below"), "images/a/0.png/below: Not a directory"),
        (("info", "now"), "unrecognized arguments: now"),
        (("demo", "--epochs", "0"), "--epochs must be at least 1"),
    ],
)
def test_errors_of_use(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    broken_image(tmp_path)
    assert message in fails(capsys, *arguments)


def test_corrupt_checkpoint(capsys, tmp_path):
    out = tmp_path / "out"
    assert main([*SMALL, "--out", str(out)]) == 0
    assert "already holds a run" in fails(capsys, *SMALL, "--out", out)
    (out / "last.ckpt").write_bytes(b"\0" * 100)
    assert "last.ckpt: corrupt checkpoint" in fails(capsys, "train", "mnistnet", "--out", out, "--resume")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_files_that_cannot_be_written(capsys, tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("dlfast.app.files.os.fsync", refuse)
    message = fails(capsys, *SMALL, "--out", tmp_path / "out")
    assert message == f"{tmp_path}/out/config.json: {os.strerror(code)}"


LIMITED = """
import resource, sys
from dlfast.app.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_real_limit_of_space(tmp_path):
    """The system itself refuses to make a file longer than 20 kB."""
    done = python("-c", LIMITED, *SMALL, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"dlfast: error: {tmp_path / 'out' / 'best.ckpt'}: File too large\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path):
    """Nothing on stderr in success; status 2 and one line in failure."""
    done = dlfast(*SMALL, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mnistnet on digits: 1259 train, 179 val, 359 test images of 8x8, 10 classes")
    assert lines[1].startswith("epoch 1/1  loss ")
    assert lines[1].endswith(" images/s")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert lines[2].startswith(f"test accuracy {result['test_accuracy']:.4f}, loss ")
    assert lines[3] == f"weights of epoch 1, the best on val; files in {tmp_path / 'out'}"
    again = dlfast(*SMALL, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert again.stdout == ""
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["pytorch_lightning", "torchmetrics", "torchvision", "sklearn", "rich"])
def test_missing_extra_is_named(capsys, tmp_path, monkeypatch, package):
    def run(args):
        monkeypatch.setitem(sys.modules, package, None)
        __import__(package)

    monkeypatch.setattr("dlfast.app.train.run", run)
    message = fails(capsys, *SMALL, "--out", tmp_path)
    assert message == f"train needs the package {package}; {CURE}"


@pytest.mark.slow
def test_without_the_extra():
    script = (
        "import sys\n"
        "for name in ('rich', 'pytorch_lightning', 'torchvision', 'sklearn', 'matplotlib', 'torchmetrics'):\n"
        "    sys.modules[name] = None\n"
        "from dlfast.app.cli import main\n"
        "sys.exit(main(['train', 'mnistnet']))\n"
    )
    done = python("-c", script)
    assert done.returncode == 2
    assert done.stderr == (f"dlfast: error: train needs the package pytorch_lightning; {CURE}\n")


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EBADF, "bug"), ModuleNotFoundError(name="x")])
def test_bugs_keep_their_traceback(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr("dlfast.info.run", run)
    with pytest.raises(type(error)):
        main(["info"])


def test_interrupted_elsewhere(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dlfast.info.run", run)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_every_option_reaches_training(monkeypatch):
    seen = []

    def fit(config):
        seen.append(config)
        raise UsageError("seen")

    monkeypatch.setattr("dlfast.app.train.fit", fit)
    words = (
        "train lenet --data folder --data-dir d --input-size 30x40 --epochs 7 --batch-size 5 --optimizer sgd "
        "--lr 0.5 --momentum 0.25 --weight-decay 0.125 --device cpu --backend torch --seed 9 --workers 1 "
        "--out o --resume --no-cuda-graph"
    )
    assert main(words.split()) == 2
    assert seen == [
        TrainConfig(
            "lenet", "folder", Path("d"), (30, 40), 7, 5, "sgd", 0.5, 0.25, 0.125, "cpu", "torch", 9, 1,
            Path("o"), resume=True, cuda_graph=False,
        )
    ]  # fmt: skip


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["demo", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_commands_are_found_lazily():
    """Asking for info imports nothing of the others; `import dlfast` imports none of the program."""
    script = (
        "import sys\n"
        "import dlfast\n"
        "heavy = ('pytorch_lightning', 'torchvision', 'sklearn', 'matplotlib', 'rich', 'torchmetrics')\n"
        "assert not any(name in sys.modules for name in (*heavy, 'dlfast.app.train', 'dlfast.app.data'))\n"
        "import dlfast.models\n"
        "from dlfast.app.cli import main\n"
        "main(['info'])\n"
        "assert not any(name in sys.modules for name in (*heavy, 'dlfast.app.train'))\n"
        "import dlfast.app.train\n"
        "assert not any(name in sys.modules for name in heavy)\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


def test_demo_compares_and_repeats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ROUNDS", 4)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["demo", "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    for words in ("test accuracy", "final training loss", "images per second", "MB saved for backward"):
        assert words in text
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["comparison.png"]
    with Image.open(tmp_path / "demo" / "comparison.png") as image:
        image.load()


def side(backend, seconds):
    class Result:
        test_accuracy = 0.98
        step_losses = (1.0, 0.5) if backend == "fused" else (1.0, 0.499)
        history = (argparse.Namespace(train_loss=0.5),)

    return demo.Side(backend, Result(), 1000, seconds)


@pytest.mark.parametrize(("fused", "verdict"), [(1.0, "faster"), (4.0, "slower"), (2.0, "no clear difference")])
def test_demo_says_what_came_out(capsys, fused, verdict):
    sides = [side("fused", [fused] * 9), side("torch", [2.0, 2.01, 1.99] * 3)]
    demo.print_table(sides)
    text = capsys.readouterr().out
    assert f"), {verdict}\n" in text
    assert "In the first epoch the losses of a step differ by 0.2 % at most." in text
    assert statistics.median(sides[0].step_seconds) == fused


def test_usage_status_is_two():
    assert cli.USAGE_STATUS == 2
