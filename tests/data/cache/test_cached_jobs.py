"""Whole jobs with cached or shared decoded images: equal traces and verdicts, and no replica hangs."""

import io
import logging
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import numpy
import PIL.Image
import pytest
import torch
from PIL import ImageOps
from rich.console import Console
from torch.utils.data import Dataset

from dreplica.config.schema import DataConfig
from dreplica.data.images import images
from dreplica.data.images.images import Images
from dreplica.data.loading.index_stream import draw_order
from dreplica.data.sources.image_folder import load_image_folder
from dreplica.report.record import terminal
from dreplica.training.evaluate import Tally
from dreplica.training.events import StepDone
from tests.data.pictures import make_folder
from tests.end_to_end.test_image_folder import AUGMENTED, WITHOUT_SPLIT, alter, run
from tests.harness import run_job
from tests.messages import texts


@pytest.mark.parametrize(
    ("augment", "own", "layout"),
    [
        ("resized_crop", "decode: node, num_workers: 2", False),
        ("resized_crop", "decode: node, cache: memory, num_workers: 1", False),
        ("crop_flip", "decode: node, cache: device, num_workers: 1", False),
        ("crop_flip", "cache: device", True),
    ],
)
def test_caches_and_sharing_give_the_same_trace(augment: str, own: str, layout: bool, tmp_path: Path) -> None:
    """Replica 0 reads every sample itself. Replicas 1 and 2 share decoded images and cache them."""
    overrides = ", ".join(f"{replica_id}: {{data: {{{own}}}}}" for replica_id in (1, 2))
    arguments = (f"--data.augment={augment}", *AUGMENTED[1:], f"--model.channels_last={layout}".lower())
    job = run(make_folder(tmp_path), *arguments, f"--overrides={{{overrides}}}", num_replicas=3)
    assert job.returncode == 0, job.output
    assert (job.report["verdict"]["agreed"], job.report["steps_checked"]) == (True, 8)


@pytest.mark.parametrize(
    "arguments", ["--data.decode=node", "--data.decode=node --data.cache=memory", "--data.cache=device"]
)
def test_replay_of_the_second_epoch_reads_the_files(arguments: str, tmp_path: Path) -> None:
    fault = "--inject=[{replica: 1, step: 6, target: batch}]"
    job = run(make_folder(tmp_path), "--data.augment=crop_flip", *arguments.split(), fault)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["suspects"]) == ("transient-fault", 6, [1]), verdict


@pytest.mark.parametrize("cache", ["none", "memory", "device"])
def test_differing_copy_of_two_that_share_names_the_file(cache: str, tmp_path: Path) -> None:
    one, other = make_folder(tmp_path / "one"), make_folder(tmp_path / "other")
    section = {"name": "imagefolder", "root": str(other), "val_fraction": 0.25}
    file, index = alter(other, DataConfig.model_validate(section), 18)
    step = draw_order(18, 0, 1).tolist().index(index) // 5 + 1
    own = (f"--overrides.{replica_id}.data.root={other}" for replica_id in (2, 3))
    job = run(one, "--data.augment=flip", "--data.decode=node", f"--data.cache={cache}", *own, num_replicas=4)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("batch-differs", step, "batch"), verdict
    assert verdict["groups"] == [[0, 1], [2, 3]]
    assert f"first such sample: index {index} ({file})" in texts(verdict["evidence"])


def folder_decoded_wrongly_once(config: DataConfig) -> tuple[Images, Images, int]:
    """Load an image folder; replica 1 decodes the first image that it trains on wrongly, once."""
    read, data = images.read_image, load_image_folder(config, augment_seed=0)
    file = data.train.describe(int(draw_order(len(data.train), 0, 1)[0]))  # type: ignore[arg-type, attr-defined]
    left = [file] if os.environ["RANK"] == "1" else []

    def read_wrongly(path: str) -> PIL.Image.Image:
        image = read(path)
        if left and path.endswith(left[0]):
            left.clear()
            image = ImageOps.flip(image)
        return image

    images.read_image = read_wrongly
    return data.train, data.val, data.num_classes  # type: ignore[return-value]


def test_cached_decoding_mistake_is_unreplayed_state(tmp_path: Path) -> None:
    """More has changed than the few bits that a fault flips."""
    data = "--data.name=tests.data.cache.test_cached_jobs:folder_decoded_wrongly_once"
    job = run(make_folder(tmp_path), data, "--data.cache=memory")
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["suspects"]) == ("unreplayed-state", 1, [1]), verdict


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """A set of noise from NumPy's global generator in the process that loads it."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(numpy.random.randint(0, 256, (3, 32, 32), dtype=numpy.uint8)), index % 2


def noise(_config: DataConfig) -> tuple[Noise, Noise, int]:
    return Noise(), Noise(), 2


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_draws_in_workers_diverge_with_a_cache_too(cache: str, tmp_path: Path) -> None:
    arguments = ("--data.name=tests.data.cache.test_cached_jobs:noise", f"--overrides.1.data.cache={cache}")
    job = run_job(*WITHOUT_SPLIT, *arguments, "--overrides.1.data.num_workers=2", root=tmp_path)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("batch-differs", 1, "batch"), verdict


def kill_when_reading(image: PIL.Image.Image) -> PIL.Image.Image:
    """Kill replica 1 at its second image. The others read slowly, so that some images are left for it."""
    global _reads
    _reads += 1
    if os.environ["RANK"] != "1":
        time.sleep(0.1)
    elif _reads == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return image


_reads = 0


def folder_where_replica_1_dies(config: DataConfig) -> tuple[Images, Images, int]:
    """Load an image folder; replica 1 is killed while it decodes, holding the lock of a slot."""
    read = images.read_image
    images.read_image = lambda path: kill_when_reading(read(path))  # type: ignore[assignment, misc]
    data = load_image_folder(config, augment_seed=0)
    return data.train, data.val, data.num_classes  # type: ignore[return-value]


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_replica_killed_while_decoding_for_all_is_named(cache: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    arguments = (
        "--data.name=tests.data.cache.test_cached_jobs:folder_where_replica_1_dies",
        "--data.decode=node",
        f"--data.cache={cache}",
    )
    job = run(root, *arguments, num_replicas=3, timeout=60)
    assert job.exitcodes == {0: 1, 1: -signal.SIGKILL, 2: 1}, job.output
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["suspects"]) == ("replica-lost", [1]), verdict


def test_unreadable_sample_is_skipped_or_ends_all(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (root / "china" / "broken.jpg").write_bytes(b"")
    shared = ("--data.decode=node", "--data.num_workers=1")
    plain = run(root, "--data.augment=flip", "--data.on_error=skip")
    assert plain.report["skipped"]["count"] == 1
    for cache in ("none", "memory", "device"):
        skipping = run(root, "--data.augment=flip", "--data.on_error=skip", *shared, f"--data.cache={cache}")
        assert skipping.returncode == 0, skipping.output
        assert skipping.trace == plain.trace
        assert skipping.report["skipped"] == plain.report["skipped"]
        stopping = run(root, *shared, f"--data.cache={cache}", timeout=60)
        assert set(stopping.exitcodes.values()) == {2}, stopping.output
        assert stopping.stderr.count("china/broken.jpg) cannot be loaded: the file is empty") == 1, stopping.stderr


def test_cache_location_is_logged(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    job = run(root, "--data.cache=memory", "--data.decode=node", "--train.max_steps=1")
    assert job.stderr.count("data.cache: 'memory': about 0.1 MB of decoded images, in /dev/shm") == 1
    job = run(root, "--data.cache=device", "--train.max_steps=1")
    assert job.stderr.count("data.cache: 'device': 0.1 MB of decoded images, stored during the first epoch") == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_first_epoch_shows_the_number_of_cached_images(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_SECONDS_BETWEEN_LINES", "_REFRESH_SECONDS"):
        monkeypatch.setattr(terminal, name, 0.0)
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=200)
    tally = Tally(torch.tensor(3), torch.tensor(4.0), count=10)
    shown = []
    for kept in (40, 0):
        display = terminal.ProgressDisplay(console, True, "identical", kept)
        with closing(display), caplog.at_level(logging.INFO):
            for epoch in (3, 4):
                display.step(StepDone(epoch, epoch, 1, 4, tally, False))
                if display._progress is not None:
                    display._progress.refresh()
                shown.append(console.file.getvalue() + caplog.text)  # type: ignore[attr-defined]
                console.file.truncate(0)  # type: ignore[attr-defined]
                caplog.clear()
    assert ["10 of 40 images in the cache" in text for text in shown] == [True, False, False, False], shown
    assert all("accuracy 0.3000" in text for text in shown)


def test_unusable_cache_settings_give_one_message(tmp_path: Path) -> None:
    job = run_job("--data.cache=memory")
    assert job.exitcodes == {0: 2, 1: 2}
    assert job.output.count("data.cache: 'memory' applies to images that are decoded, but 'digits' provides") == 1
    job = run(make_folder(tmp_path), "--data.cache=device", "--data.augment=trivial")
    assert job.exitcodes == {0: 2, 1: 2}
    assert job.output.count("but data.augment is 'trivial'") == 1
