"""Training: same seed, same result; fused as plain; what a run leaves; wrong settings."""

import csv
import fcntl
import json
import os

import pytest
import torch
from PIL import Image

import dlfast
from dlfast.app.errors import UsageError
from dlfast.app.lightning import Epoch, Training, best_epoch
from dlfast.app.settings import Settings, make_optimizer, new_settings, read_settings
from dlfast.app.train import TrainConfig, fit
from dlfast.models import NETWORKS, build
from tests.support.program import assert_same_run, history, rows, small, state

SIZES = {"twoconv": 8, "convpool": 12, "mnistnet": 8, "stacked": 10, "lenet": 20}
# lenet's article learns at 0.001 from batches of 4, too slowly for 50 steps to show anything.
LEARNING_RATES = {"lenet": 0.02}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The steps are too small for two, which only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fifty_losses(name, backend):
    config = TrainConfig(
        name, input_size=(SIZES[name], SIZES[name]), epochs=1, batch_size=24, backend=backend,
        lr=LEARNING_RATES.get(name), device="cpu", progress=False,
    )  # fmt: skip
    losses = torch.tensor(fit(config).step_losses[:50])
    assert len(losses) == 50
    return losses


@pytest.mark.parametrize("name", list(NETWORKS))
def test_loss_curves_of_both_backends_agree(name):
    """Over the first 50 steps, to 2e-4 of the loss.

    Both round their float32 sums differently, by about 1e-7 in a step, and training amplifies that. Plain
    PyTorch with and without oneDNN's convolutions drifts apart by up to 1.5e-5 in these very runs; kernels
    of ours are allowed ten times as much.
    """
    fused, plain = (fifty_losses(name, backend) for backend in ("fused", "torch"))
    torch.testing.assert_close(fused, plain, rtol=2e-4, atol=0)
    assert plain[-10:].mean() < plain[:10].mean() - 0.01


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, fit(small(out))


def test_same_seed_same_result(finished, tmp_path):
    out, result = finished
    again = fit(small(tmp_path / "again"))
    assert history(again) == history(result)
    assert again.step_losses == result.step_losses
    assert again.test_accuracy == result.test_accuracy
    assert_same_run(tmp_path / "again", out)
    assert fit(small(seed=1)).step_losses != result.step_losses


def test_workers_do_not_change_the_result(finished):
    assert fit(small(workers=2)).step_losses == finished[1].step_losses


def test_what_a_run_leaves(finished):
    out, result = finished
    names = {"config.json", "last.ckpt", "best.ckpt", "metrics.csv", "curves.png", "result.json"}
    assert {path.name for path in out.iterdir()} == names
    with open(out / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in table] == [1, 2, 3]
    assert [float(row["val_accuracy"]) for row in table] == [row.val_accuracy for row in result.history]
    assert all(float(row["images_per_second"]) > 0 for row in table)
    with Image.open(out / "curves.png") as image:
        image.load()
        assert min(image.size) > 200
    summary = json.loads((out / "result.json").read_text())
    assert summary["test_accuracy"] == result.test_accuracy
    assert read_settings(out / "config.json") == new_settings(small(out))
    assert result.best_checkpoint == out / "best.ckpt"
    assert len(result.step_losses) == 60


def test_accuracy_and_loss_are_those_of_the_best_weights(finished):
    from dlfast.app.data import batches, load

    out, result = finished
    network = build("mnistnet", input_size=8, fused=False)
    weights = torch.load(out / "best.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    ((images, labels),) = batches(load("digits", 1, (8, 8)).test, 1000)
    output = network(images)
    assert result.test_accuracy == pytest.approx((output.argmax(1) == labels).float().mean().item(), abs=1e-6)
    assert result.test_loss == pytest.approx(network.loss(output, labels).item(), rel=1e-5)
    assert result.test_accuracy > 0.8


def test_best_epoch():
    def epoch(number, accuracy, loss):
        return Epoch(number, 0.0, 0.0, loss, accuracy, 1.0, 1.0)

    assert best_epoch([epoch(1, 0.5, 1.0), epoch(2, 0.6, 2.0), epoch(3, 0.6, 1.5), epoch(4, 0.6, 1.5)]).epoch == 3
    assert best_epoch([epoch(1, 0.1, float("nan")), epoch(2, 0.1, 3.0)]).epoch == 2


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit(small(epochs=1))
    assert (result.best_checkpoint, result.last_checkpoint) == (None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimizer_gets_its_options(backend, optimizer):
    options = {"optimizer": optimizer, "backend": backend, "lr": 0.02, "weight_decay": 0.125}
    if optimizer == "sgd":
        options["momentum"] = 0.5
    config = small(epochs=1, **options)
    made = make_optimizer(new_settings(config), [torch.nn.Parameter(torch.zeros(1))])
    kinds = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    assert type(made) is getattr(dlfast.optim if backend == "fused" else torch.optim, kinds[optimizer])
    (group,) = made.param_groups
    assert group["lr"] == 0.02
    assert group["weight_decay"] == 0.125
    assert optimizer != "sgd" or group["momentum"] == 0.5
    assert fit(config).history[0].train_loss > 0


def test_settings_are_those_of_the_articles():
    lenet = new_settings(TrainConfig("lenet"))
    assert (lenet.optimizer, lenet.lr, lenet.momentum, lenet.batch_size) == ("sgd", 0.001, 0.9, 4)
    mnistnet = new_settings(TrainConfig("mnistnet"))
    assert (mnistnet.optimizer, mnistnet.lr, mnistnet.batch_size) == ("adam", 1e-3, 64)
    # Another optimizer than the article's does not inherit its numbers.
    other = new_settings(TrainConfig("lenet", optimizer="adamw"))
    assert (other.lr, other.momentum, other.weight_decay) == (1e-3, 0.0, 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet"}, "unknown network 'resnet'"),
        ({"data": "imagenet"}, "--data must be one of digits, mnist, cifar10, folder"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"lr": 0.0}, "--lr must be a positive number"),
        ({"lr": float("nan")}, "--lr must be a positive number"),
        ({"lr": float("inf")}, "--lr must be a positive number"),
        ({"optimizer": "sgd", "momentum": 1.0}, "--momentum must be"),
        ({"momentum": 0.9}, "--momentum belongs to sgd"),
        ({"weight_decay": -1.0}, "--weight-decay must be"),
        ({"optimizer": "lion"}, "--optimizer must be one of"),
        ({"device": "tpu"}, "--device must be one of"),
        ({"backend": "jax"}, "--backend must be one of"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"seed": 2**32}, "--seed must be below"),
        ({"workers": -1}, "--workers must be at least 0"),
        ({"input_size": (3, 3)}, r"mnistnet: input_size \(3, 3\) is too small"),
        ({"resume": True}, "--resume: there is no run in"),
        ({"data": "folder"}, "needs --data-dir"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        fit(small(tmp_path / "out", **options))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none():
    with pytest.raises(UsageError, match="no CUDA device"):
        fit(small(device="cuda"))


def test_a_run_is_not_overwritten(finished):
    out, _ = finished
    before = (out / "last.ckpt").read_bytes()
    with pytest.raises(UsageError, match="already holds a run; go on with --resume"):
        fit(small(out))
    assert (out / "last.ckpt").read_bytes() == before


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        fit(small(tmp_path / "file"))


def test_two_processes_cannot_share_a_folder(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match="another process is training"):
            fit(small(tmp_path))
    finally:
        os.close(descriptor)
    fit(small(tmp_path, epochs=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_ends_training_by_its_name(tmp_path, workers):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("L", (8, 8), index * 40).save(tmp_path / name / f"{index}.png")
    for index in range(6):
        (tmp_path / "a" / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    config = small(data="folder", data_dir=tmp_path, workers=workers, epochs=1)
    with pytest.raises(UsageError, match=r"/a/\d.png: not a readable image") as caught:
        fit(config)
    assert "Traceback" not in str(caught.value)


def test_folder_of_images_trains(tmp_path):
    for value, name in ((20, "dark"), (200, "light")):
        for part, count in (("train", 16), ("val", 4)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 18), (value + index,) * 3).save(tmp_path / part / name / f"{index}.png")
    result = fit(small(data="folder", data_dir=tmp_path, batch_size=8, epochs=4))
    assert (result.test_name, result.test_accuracy) == ("val", 1.0)


def test_checkpoints_hold_no_code(finished):
    out, _ = finished
    checkpoint = torch.load(out / "last.ckpt", weights_only=True)
    assert checkpoint["dlfast"]["settings"]["network"] == "mnistnet"
    assert len(state(out / "last.ckpt")) == len(state(out / "best.ckpt"))
    assert len(rows(out)) == len(checkpoint["callbacks"]["Record"]["history"])


def test_training_names_are_not_part_of_the_weights():
    settings = Settings(**vars(new_settings(small())))
    keys = Training(build("mnistnet", input_size=8), settings, 10, "").state_dict()
    assert set(keys) == {f"model.{key}" for key in build("mnistnet", input_size=8).state_dict()}
