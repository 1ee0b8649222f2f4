"""Whole jobs on image folders: all file formats, workers, augmentation, sample weights, and errors."""

import contextlib
import os
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import nn

from dreplica.config.load import load_config
from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.images.augment import make_augmentation
from dreplica.data.images.images import Images
from dreplica.data.loading.index_stream import draw_order
from dreplica.replica.build import build_replica
from tests.data.pictures import make_folder
from tests.end_to_end.test_bad_input import messages
from tests.harness import REPOSITORY, Job, run_job
from tests.messages import texts
from tests.replica.test_pretrained import put, random_state

CPU = torch.device("cpu")

JOB = (
    "--model.factory=tests.end_to_end.test_image_folder:small_model",
    "--data.name=imagefolder",
    "--data.image_size=32",
    "--data.batch_size=5",
    "--data.val_fraction=0.25",
    "--optim.lr=0.01",
    "--schedule={}",
    "--train.epochs=2",
)
WITHOUT_SPLIT = tuple(argument for argument in JOB if not argument.startswith("--data.val_fraction"))
"""Arguments for data of a function, which does not read `data.val_fraction`."""
AUGMENTED = ("--data.augment=resized_crop", "--data.sample_weights=balanced", "--seed.augment=7")


def small_model(num_classes: int) -> nn.Module:
    """Build a model for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 16, num_classes),
    )


def run(images: Path, *arguments: str, **options: Any) -> Job:
    return run_job(*JOB, f"--data.root={images}", *arguments, **options)


def test_augment_seed_changes_the_trace_and_workers_do_not(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    jobs = [run(root, *AUGMENTED, f"--data.num_workers={num_workers}") for num_workers in (0, 1)]
    for job in jobs:
        assert job.returncode == 0, job.output
        assert job.report["verdict"]["agreed"]
        assert job.report["steps_checked"] == 8
    traces = [job.trace for job in jobs]
    assert len(traces[0]) > 8
    assert traces[0] == traces[1]
    other = run(root, *AUGMENTED[:-1], "--seed.augment=8")
    assert other.trace[1] == traces[0][1]  # the build
    assert other.trace[2:] != traces[0][2:]


def test_fault_in_the_second_epoch_replays_the_same_pixels(tmp_path: Path) -> None:
    job = run(make_folder(tmp_path), *AUGMENTED, "--inject=[{replica: 1, step: 6, target: weights}]")
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["suspects"]) == ("transient-fault", 6, [1]), verdict


def alter(root: Path, data: DataConfig, num_steps: int) -> tuple[str, int]:
    """Change one byte of pixels in a BMP that is trained on, and return the file's name and index."""
    train = load_data(data).train
    assert isinstance(train, Images)
    index = next(i for i in range(num_steps) if train.describe(i).endswith(".bmp"))
    path = root / train.describe(index)
    with PIL.Image.open(path) as image:
        width, height = image.size
    content = bytearray(path.read_bytes())
    content[62 + (width + 31) // 32 * 4 * (height // 2) + 2] ^= 0xFF  # eight pixels near the middle
    path.write_bytes(bytes(content))
    return train.describe(index), index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_file_that_differs_is_named_at_the_step_that_uses_it(num_workers: int, tmp_path: Path) -> None:
    one, other = make_folder(tmp_path / "one"), make_folder(tmp_path / "other")
    section = {"name": "imagefolder", "root": str(other), "val_fraction": 0.25}
    file, index = alter(other, DataConfig.model_validate(section), 18)
    step = draw_order(18, 0, 1).tolist().index(index) // 5 + 1
    arguments = ("--data.augment=flip", f"--data.num_workers={num_workers}")
    job = run(one, *arguments, f"--overrides.1.data.root={other}")
    assert job.exitcodes == {0: 3, 1: 3}, job.output
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("batch-differs", step, "batch"), verdict
    assert f"first such sample: index {index} ({file})" in texts(verdict["evidence"])


def still_running(folder: Path) -> list[str]:
    """Return the processes, loader workers included, whose standard output goes to a file in `folder`."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if os.readlink(link).startswith(str(folder)):
                found.append(link.parts[2])
    return found


def break_one(root: Path) -> str:
    file = root / "china" / "00.jpg"
    file.write_bytes(file.read_bytes()[:200])
    return "china/00.jpg"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_file_gives_one_message_and_exit_code_2(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the harness stores the output of a job
    file = break_one(make_folder(tmp_path / "images", 9))
    job = run(tmp_path / "images", "--data.split_seed=1", f"--data.num_workers={num_workers}")
    assert still_running(tmp_path) == []
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    (message,) = messages(job.output)
    assert message.startswith("error: data.root: the sample at index ")
    assert f"({file})" in message
    assert message.endswith("--data.on_error skip.")
    assert "Traceback" not in job.output


@pytest.mark.parametrize("broken", [0, 1])
def test_damaged_file_on_one_node_ends_all_with_exit_code_2(broken: int, tmp_path: Path) -> None:
    one, other = make_folder(tmp_path / "one", 9), make_folder(tmp_path / "other", 9)
    file = Path("china", "00.jpg")
    content = ((one, other)[broken] / file).read_bytes()
    ((one, other)[broken] / file).write_bytes(bytes(len(content)))  # the same size: preflight reads no content
    job = run(one, "--data.split_seed=1", f"--overrides.1.data.root={other}")
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    (message,) = messages(job.output)
    assert f"({file})" in message
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["suspects"]) == ("replica-lost", [broken])
    assert f"({file})" in verdict["summary"]
    assert "Traceback" not in job.output


def test_skipping_applies_to_all_replicas(tmp_path: Path) -> None:
    one, other = make_folder(tmp_path / "one"), make_folder(tmp_path / "other")
    file = break_one(other)
    job = run(one, *AUGMENTED, f"--overrides.1.data.root={other}", "--data.on_error=skip", "--data.num_workers=1")
    assert job.returncode == 0, job.output
    assert job.report["verdict"]["agreed"]
    assert job.report["skipped"]["count"] == 1
    (line,) = job.report["skipped"]["samples"]
    assert f"({file})" in line
    assert job.output.count("skipped 1 sample:") == 1


def test_batch_size_is_checked_after_skipping(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    assert run(root, "--data.batch_size=18", "--train.epochs=1").report["steps_checked"] == 1
    break_one(root)
    job = run(root, "--data.batch_size=18", "--data.on_error=skip", root=tmp_path / "runs")
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    (message,) = messages(job.output)
    assert message == (
        "error: data.batch_size: 18 is more than the 17 samples of the training set. Choose 17 or fewer."
    )
    assert not (tmp_path / "runs").exists()


def test_finetune_recipe_trace_does_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    put(cache, "resnet18", random_state("resnet18"))
    root = make_folder(tmp_path / "images")
    settings = ("--config=configs/finetune_folder.yaml", f"--data.root={root}", "--data.image_size=32")
    settings += ("--data.batch_size=7", "--train.epochs=2", "--schedule.step_size=1")
    jobs = [
        run_job(*settings, f"--data.num_workers={num_workers}", f"--data.decode={decode}")
        for num_workers, decode in ((0, "replica"), (2, "node"), (4, "node"))
    ]
    for job in jobs:
        assert job.returncode == 0, job.output
        assert "; the head 'fc' is drawn from the seed" in job.output
        assert job.report["verdict"]["agreed"]
        assert job.report["steps_checked"] == 6
        assert len(job.report["epochs"][-1]["val"]["accuracy"]) == 1, "both replicas have the same accuracy"
    assert jobs[0].trace == jobs[1].trace == jobs[2].trace
    assert len(jobs[0].trace) > 6


@pytest.mark.parametrize("name", ["finetune_folder", "cifar10", "imagenet_resnet50"])
def test_configs_of_real_jobs_are_valid_and_documented(name: str) -> None:
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config = load_config([f"--config={path}"], 2)
    assert config.run.name == name
    assert make_augmentation(config.data, 32) is not None
    header = path.read_text().partition("run:")[0]
    for word in ("# What: ", "# Expected: ", "# Time: ", "Hardware: ", "# Command: torchrun "):
        assert word in header
    replica = build_replica(
        config.model_copy(update={"model": config.model.model_copy(update={"weights": None})}), 10, CPU
    )
    replica.model.eval()
    assert replica.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


class Wrong(torch.utils.data.Dataset[Any]):
    """A set of 32 samples, of which one is wrong as `kind` says."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        if index == 17 and self.kind == "raises":
            raise KeyError("no such row")
        label = 2 if index == 17 and self.kind == "label" else index % 2
        size = 9 if index == 17 and self.kind == "shape" else 8
        return torch.full((3, size, size), float(index)), label


def raises(_config: DataConfig) -> Any:
    return Wrong("raises"), Wrong("sound"), 2


def label(_config: DataConfig) -> Any:
    return Wrong("label"), Wrong("sound"), 2


def label_in_validation(_config: DataConfig) -> Any:
    return Wrong("sound"), Wrong("label"), 2


def shape(_config: DataConfig) -> Any:
    return Wrong("shape"), Wrong("sound"), 2


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "the sample at index 17 cannot be loaded: KeyError: 'no such row' (test_image_folder.py, line "),
        ("label", "the sample at index 17 has the label 2, and there are 2 classes"),
        ("label_in_validation", "the sample at index 17 has the label 2, and there are 2 classes"),
        ("shape", "cannot collate these samples into a batch (index"),
    ],
)
def test_failing_user_data_set_gives_one_message(name: str, words: str, num_workers: int) -> None:
    job = run_job(
        *WITHOUT_SPLIT,
        "--data.image_size=null",
        f"--data.name={__name__}:{name}",
        f"--data.num_workers={num_workers}",
    )
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    (message,) = messages(job.output)
    assert message.startswith("error: data.name: ")
    assert words in message
    assert "Traceback" not in job.output


def test_unweightable_criterion_fails_before_the_first_step(tmp_path: Path) -> None:
    arguments = ("--data.sample_weights=balanced", "--replica.factory=tests.end_to_end.test_image_folder:with_own_loss")
    job = run(make_folder(tmp_path / "images"), *arguments, root=tmp_path / "runs")
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    (message,) = messages(job.output)
    assert message.startswith(
        "error: data.sample_weights: expected a criterion with `reduction` mean or sum, got a OwnLoss"
    )
    assert not (tmp_path / "runs").exists()


class OwnLoss(nn.Module):
    """A loss that returns only the mean over the batch."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels)


def with_own_loss(_config: Any, num_classes: int, device: torch.device) -> Any:
    """Build a replica whose criterion returns no loss per sample."""
    from dreplica import Replica

    model = small_model(num_classes).to(device)
    return Replica(model=model, criterion=OwnLoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
