"""Tests of caches of decoded images: files are read once, and the pixels equal those without a cache."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.config.schema import DataConfig
from dreplica.data import image_sharing
from dreplica.data.cache.device_cache import DeviceCachedImages
from dreplica.data.cache.shared_file_cache import SharedFileCache
from dreplica.data.datasets import load_data, prepare_data
from dreplica.data.images import images
from dreplica.data.loading import index_stream, loader
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import load_batches, reload_batch
from dreplica.data.samples import DataSets, at_epoch
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.errors import SharedUsageError
from tests.data.loading.test_loader import bytes_of, let_workers_start
from tests.data.pictures import make_folder
from tests.harness import run_replicas

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
ALONE = World(0, 1, Channel(), None, "here")


def section(root: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"name": "imagefolder", "root": str(root), "image_size": 32, "batch_size": 5, "val_fraction": 0.25, **more}
    )


def prepared(root: Path, world: World = ALONE, device: str = "cpu", **more: Any) -> DataSets:
    return prepare_data(section(root, **more), 0, world, torch.device(device))


def counting(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Log each file that this process, or one that it forks, reads from now on, to a file in `folder`."""
    read = images.read_image

    def read_and_count(path: str) -> Any:
        with open(folder / "reads", "a") as log:
            log.write(f"{path}\n")
        return read(path)

    if monkeypatch is None:
        images.read_image = read_and_count
    else:
        monkeypatch.setattr(images, "read_image", read_and_count)


def reads(folder: Path) -> list[str]:
    """Return the files that all processes read since the last call."""
    lines = (folder / "reads").read_text().splitlines() if (folder / "reads").exists() else []
    (folder / "reads").unlink(missing_ok=True)
    return lines


def epoch_of(
    data: DataSets,
    epoch: int,
    num_workers: int,
    sender: IndexSampler,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.preserve_format,
) -> list[Any]:
    """Return the batches of a training epoch (0: of a validation pass) as bytes."""
    if epoch == 0:
        stream, part = sender.evaluation_batches(len(data.val), 5), data.val  # type: ignore[arg-type]
    else:
        stream = sender.training_batches(len(data.train), 5, epoch)  # type: ignore[arg-type]
        part = at_epoch(data.train, epoch)
    where = torch.device(device)
    batches = list(load_batches(part, stream, where, num_workers, 0, epoch, memory_format))
    layout = torch.contiguous_format if memory_format is torch.preserve_format else memory_format
    assert all(batch.inputs.is_contiguous(memory_format=layout) for batch in batches)
    moved = (type(batch)(batch.indices, batch.inputs.cpu(), batch.labels.cpu()) for batch in batches)
    return [bytes_of(batch) for batch in moved]


EPOCHS = (1, 0, 2, 0, 3)


def epochs_of(data: DataSets, num_workers: int = 0, channel: Channel | None = None, **more: Any) -> list[Any]:
    sender = IndexSampler(channel or Channel(), 0)
    return [epoch_of(data, epoch, num_workers, sender, **more) for epoch in EPOCHS]


def assert_replays_read_files(cached: DataSets, plain: DataSets, tmp_path: Path) -> None:
    """Check that a replay uses no cached image."""
    again = reload_batch(at_epoch(cached.train, 2), torch.tensor([3, 5]), CPU)
    assert len(reads(tmp_path)) == 2
    assert bytes_of(again) == bytes_of(reload_batch(at_epoch(plain.train, 2), torch.tensor([3, 5]), CPU))


@pytest.mark.process
@pytest.mark.parametrize("augment", [None, "flip", "crop_flip", "resized_crop", "trivial"])
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_memory_cache_gives_same_pixels_and_reads_once(
    augment: str | None, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "images", 8)
    expected = epochs_of(prepared(root, augment=augment))
    assert (expected[0] == expected[2]) is False
    counting(tmp_path, monkeypatch)
    cached = prepared(root, augment=augment, cache="memory")
    reads(tmp_path)  # some are read to estimate the size
    assert epochs_of(cached, num_workers) == expected
    files = reads(tmp_path)
    assert len(files) == len(set(files)) == 16
    assert_replays_read_files(cached, prepared(root, augment=augment), tmp_path)


@pytest.mark.process
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", [None, "flip", "crop_flip"])
@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.channels_last])
def test_device_cache_gives_same_pixels_and_reads_once(
    device: str,
    augment: str | None,
    num_workers: int,
    memory_format: torch.memory_format,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_folder(tmp_path / "images", 8)
    layout = {"device": device, "memory_format": memory_format}
    expected = epochs_of(prepared(root, augment=augment), **layout)
    counting(tmp_path, monkeypatch)
    cached = prepared(root, device=device, augment=augment, cache="device")
    assert epochs_of(cached, num_workers, **layout) == expected
    files = reads(tmp_path)
    assert len(files) == len(set(files)) == 16
    assert_replays_read_files(cached, prepared(root, augment=augment), tmp_path)
    assert cached.train[3][0].numpy().tobytes() == prepared(root, augment=augment).train[3][0].numpy().tobytes()


def test_next_epoch_completes_a_partly_filled_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "images", 8)
    expected = epochs_of(prepared(root, augment="flip"))
    counting(tmp_path, monkeypatch)
    for cache, num_reads in (("memory", 12), ("device", 17)):
        data, sender = prepared(root, augment="flip", cache=cache), IndexSampler(Channel(), 0)
        first = load_batches(at_epoch(data.train, 1), sender.training_batches(12, 5, 1), CPU, 0, 0, 1)
        assert bytes_of(next(first)) == expected[0][0]
        first.close()
        assert [epoch_of(data, epoch, 0, sender) for epoch in (2, 3)] == [expected[2], expected[4]]
        assert len(reads(tmp_path)) == num_reads


def test_device_cache_receives_windows_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path, 8)
    for module in (index_stream, loader):
        monkeypatch.setattr(module, "WINDOW", 1)
    assert epochs_of(prepared(root, cache="device")) == epochs_of(prepared(root))


def load_shared(world: World, root: str, folder: str, num_workers: int, more: dict[str, Any]) -> Any:
    let_workers_start()
    image_sharing._MEMORY_FILES = f"{folder}/files"
    data = prepared(Path(root), world, augment="flip", num_workers=num_workers, **more)
    world.channel.gather(None)
    counting(Path(folder))
    return epochs_of(data, num_workers, world.channel)


@pytest.mark.parametrize(
    ("more", "num_reads"),
    [
        ({"decode": "node"}, 3 * 12 + 2 * 4),
        ({"decode": "node", "cache": "memory"}, 16),
        ({"decode": "node", "cache": "device"}, 16),
        ({"cache": "memory"}, 2 * 16),
        ({"decode": "node", "on_error": "skip", "cache": "memory"}, 0),
        ({}, 2 * (3 * 12 + 2 * 4)),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_replicas_of_a_node_decode_each_sample_once(
    more: dict[str, Any], num_reads: int, num_workers: int, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "images", 8)
    expected = epochs_of(prepared(root, augment="flip"))
    (tmp_path / "files").mkdir()
    results = run_replicas(load_shared, 2, str(root), str(tmp_path), num_workers, more)
    assert results == [expected, expected]
    assert len(reads(tmp_path)) == num_reads
    assert list((tmp_path / "files").iterdir()) == []


def load_other_samples(world: World, root: str) -> Any:
    """Load samples that replica 1 receives in another order."""
    data = prepared(Path(root), world, augment="flip", decode="node")
    alone = IndexSampler(Channel(), world.replica_id)
    alone._channel.rank, alone._channel.size = 0, 1
    return epoch_of(data, 1, 0, alone)


def test_replica_with_other_indices_loads_those(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 8)
    plain = prepared(root, augment="flip")
    expected = [epoch_of(plain, 1, 0, IndexSampler(Channel(), seed)) for seed in (0, 1)]
    assert expected[0] != expected[1]
    assert run_replicas(load_other_samples, 2, str(root)) == expected


@pytest.mark.parametrize("num_batches", [1, 4])
def test_ring_gives_no_stale_pixels(num_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One replica shares with itself, so the ring always holds another batch, epoch, pass or set."""
    root = make_folder(tmp_path / "images", 8)
    plain = prepared(root, augment="trivial")
    path = image_sharing._create({"ring": image_sharing._File(5 * num_batches, 3072, 0)}, section(root), 1)["ring"]
    ring = image_sharing.BatchRing(SharedFileCache(image_sharing._open(path), 5 * num_batches, 3072), 5)
    os.unlink(path)
    sets = enumerate((plain.train, plain.val))
    train, val = (images.with_caches(None, set_id, ring) for set_id, images in sets)  # type: ignore[attr-defined]
    shared = DataSets(train, val, 2, "")
    assert epochs_of(shared) == epochs_of(plain)
    counting(tmp_path, monkeypatch)
    sender, other = IndexSampler(Channel(), 0), IndexSampler(Channel(), 0)
    for _ in range(2):
        assert epoch_of(shared, 1, 0, sender) == epoch_of(plain, 1, 0, other)
    assert len(reads(tmp_path)) == 4 * 12  # no image of an earlier pass is used, so a benchmark may repeat one
    # Not even of a pass with the same number.
    for view, same in ((train, plain.train), (train.at_epoch(2), at_epoch(plain.train, 2)), (val, plain.val)):
        assert view.load_batch(range(4), (1, 0))[0].tolist() == [same[index][0].tolist() for index in range(4)]


def test_ring_uses_exactly_its_slots() -> None:
    class Recording:
        num_slots, wanted = 15, set[int]()

        def fetch(self, wanted: list[tuple[int, Any]], _make: Any) -> list[Any]:
            assert len({slot for slot, _ in wanted}) == len(wanted)
            self.wanted |= {slot for slot, _ in wanted}
            return []

    ring = image_sharing.BatchRing(Recording(), 5)  # type: ignore[arg-type]
    for number in range(7):
        ring((1, number), [(0, 0, 1, index) for index in range(5)], lambda _: None)  # type: ignore[arg-type, return-value]
    assert Recording.wanted == set(range(15))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"cache": "memory"}, r"data.cache: 'memory' applies to images .*'digits' provides TensorImages. Remove it"),
        ({"cache": "device"}, r"data.cache: 'device' applies to images .*'digits' provides TensorImages. Remove it"),
        ({"decode": "node"}, r"data.decode: 'node' applies to images .*'digits' provides TensorImages. Remove it"),
    ],
)
def test_cache_of_other_data_is_a_usage_error(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SharedUsageError, match=f"^{words}"):
        prepare_data(DataConfig.model_validate(config), 0, ALONE, CPU)


@pytest.mark.parametrize("augment", ["resized_crop", "trivial", "tests.data.images.test_augment:of_all_generators"])
def test_device_cache_rejects_augmentations_that_compute(augment: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path, 8)
    with pytest.raises(SharedUsageError, match=rf"^data.cache: 'device' .*but data.augment is '{augment}'. Use one of"):
        prepared(root, augment=augment, cache="device")


def test_too_little_memory_or_space_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path, 8)
    needed = 16 * 32 * 32 * 3
    monkeypatch.setattr(image_sharing, "available_memory", lambda: needed - 1)
    with pytest.raises(SharedUsageError, match=r"^data.cache: 'memory' needs about 0.0 MB .* use --data.cache none"):
        prepared(root, cache="memory")
    with pytest.raises(SharedUsageError, match=r"^data.cache: 'device' needs 0.0 MB .*Use --data.cache memory"):
        prepared(root, cache="device")
    monkeypatch.setattr(image_sharing, "available_memory", lambda: needed)
    prepared(root, cache="memory")
    prepared(root, cache="device")
    monkeypatch.setattr(image_sharing.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": needed}))
    with pytest.raises(SharedUsageError, match=r"not enough space in .*TMPDIR"):
        prepared(root, cache="memory")


def test_size_of_whole_images_is_estimated_from_some(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 8)
    fitted, whole = (load_data(section(root, augment=augment)).train for augment in ("flip", "resized_crop"))
    assert fitted.cached_bytes_per_image() == 3 * 32 * 32  # type: ignore[attr-defined]
    sizes = [whole._make_cacheable(index)[0].nbytes for index in range(len(whole))]  # type: ignore[attr-defined, arg-type]
    assert min(sizes) < whole.cached_bytes_per_image() < max(sizes)  # type: ignore[attr-defined]


def test_device_cache_stores_images_before_augmentation(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 8)
    data = prepared(root, augment="flip", cache="device")
    assert isinstance(data.train, DeviceCachedImages)
    epoch_of(data, 1, 0, IndexSampler(Channel(), 0))
    kept = data.train.store.images.clone()
    epoch_of(data, 2, 0, IndexSampler(Channel(), 0))
    assert kept.equal(data.train.store.images)
    unaugmented = prepared(root).train
    assert all(kept[index].equal(unaugmented[index][0]) for index in range(12))
