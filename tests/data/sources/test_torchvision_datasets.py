"""Tests of torchvision's data sets: found, downloaded once per node, or an error that says how to get them."""

import errno
import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.loading.loader import reload_batch
from dreplica.data.samples import DataSets
from dreplica.data.sources.torchvision_datasets import SETS
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from tests.data.pictures import cut
from tests.harness import run_replicas

CPU = torch.device("cpu")
NUM = 6
"""Samples in each of CIFAR-10's five training files, and in its test file."""


def cifar10_archive() -> bytes:
    """Return an archive in the layout of cifar-10-python.tar.gz."""
    generator = numpy.random.default_rng(0)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:

        def add(name: str, value: Any) -> None:
            content = pickle.dumps(value)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            pixels = generator.integers(0, 256, (NUM, 3072), dtype=numpy.uint8)
            add(name, {"data": pixels, "labels": [number % 10 for number in range(NUM)]})
        add("batches.meta", {"label_names": [str(number) for number in range(10)]})
    return gzip.compress(packed.getvalue(), mtime=0)  # the same in every process


ARCHIVE = cifar10_archive()


def point_to(address: str) -> None:
    """Let torchvision download this archive as CIFAR-10."""
    dataset = torchvision.datasets.CIFAR10
    dataset.url = f"{address}/cifar-10-python.tar.gz"
    dataset.tgz_md5 = hashlib.md5(ARCHIVE).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as archive:
        sums = {
            member.name.split("/")[1]: hashlib.md5(archive.extractfile(member).read()).hexdigest()  # type: ignore[union-attr]
            for member in archive
        }
    dataset.train_list = [[name, sums[name]] for name in sums if name.startswith("data")]
    dataset.test_list = [["test_batch", sums["test_batch"]]]
    dataset.meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}


@pytest.fixture(autouse=True)
def restored_torchvision() -> Iterator[None]:
    dataset = torchvision.datasets.CIFAR10
    names = ("url", "tgz_md5", "train_list", "test_list", "meta")
    before = {name: getattr(dataset, name) for name in names}
    yield
    for name, value in before.items():
        setattr(dataset, name, value)


class Server:
    """A server of the archive that counts requests."""

    def __init__(self) -> None:
        self.num_requests = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.num_requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(ARCHIVE)))
                self.end_headers()
                self.wfile.write(ARCHIVE)

            def log_message(self, *_args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def load(root: Path, name: str = "CIFAR10", **values: Any) -> DataSets:
    return load_data(DataConfig.model_validate({"name": name, "root": str(root), **values}))


def load_cifar10(world: World, root: Path, address: str) -> str:
    point_to(address)
    try:
        return load(root).digest
    except UsageError as error:
        return str(error)


def test_data_set_is_downloaded_once_per_node(server: Server, tmp_path: Path) -> None:
    point_to(server.address)
    digest = load(tmp_path / "alone").digest
    by_one, server.num_requests = server.num_requests, 0
    digests = run_replicas(load_cifar10, 3, tmp_path / "data", server.address)
    assert digests == [digest] * 3
    assert server.num_requests == by_one > 0


def test_samples_of_cifar10(server: Server, tmp_path: Path) -> None:
    point_to(server.address)
    data = load(tmp_path, augment="crop_flip", sample_weights="balanced")
    assert (len(data.train), len(data.val), data.num_classes) == (5 * NUM, NUM, 10)  # type: ignore[arg-type]
    original = torchvision.datasets.CIFAR10(tmp_path, train=False)
    image, label = data.val[2]
    assert image.permute(1, 2, 0).numpy().tobytes() == original.data[2].tobytes()
    assert (image.shape, label) == ((3, 32, 32), 2)
    assert data.weights is not None
    assert data.weights.tolist() == [1.0] * 5 * NUM
    batch = reload_batch(data.val, torch.tensor([2]), CPU)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in SETS["CIFAR10"].normalization)
    torch.testing.assert_close(batch.inputs[0], (image / 255 - mean) / std)


def test_digest_depends_on_pixels(server: Server, tmp_path: Path) -> None:
    point_to(server.address)
    digest = load(tmp_path).digest
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"is missing in .* or damaged .*\. Delete '.*/\.CIFAR10\.complete'"):
        load(tmp_path)
    torchvision.datasets.CIFAR10.test_list = [["test_batch", hashlib.md5(content).hexdigest()]]
    assert load(tmp_path).digest != digest


def test_archive_in_place_needs_no_network(tmp_path: Path) -> None:
    point_to("http://127.0.0.1:9")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    assert len(load(tmp_path).train) == 5 * NUM  # type: ignore[arg-type]


def test_split_settings_beside_a_validation_set_are_an_error(tmp_path: Path) -> None:
    point_to("http://127.0.0.1:9")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    with pytest.raises(
        UsageError, match=r"^data.val_fraction: this and data.split_seed have no effect because"
    ) as caught:
        load(tmp_path, val_fraction=0.5, split_seed=1)
    assert caught.value.code == "ignored-setting"


def test_offline_error_says_which_archive_to_put_where(tmp_path: Path) -> None:
    messages = run_replicas(load_cifar10, 2, tmp_path / "data", "http://127.0.0.1:9")
    for message in messages:
        assert message.startswith(
            f"data.name: CIFAR10 is not in '{tmp_path}/data' (data.root) and cannot be downloaded"
        )
        assert f"Put http://127.0.0.1:9/cifar-10-python.tar.gz into '{tmp_path}/data'" in message
        assert "torchvision.datasets.CIFAR10('data', download=True)" in message


def test_read_only_folder_works_if_complete(tmp_path: Path) -> None:
    put_mnist(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreplica.data.sources.torchvision_datasets.once_per_node", read_only)
        assert len(load(tmp_path, "MNIST").train) == 8  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"KMNIST is missing in .* is not writable \(Read-only file system\)"):
            load(tmp_path, "KMNIST")


def read_only(*_args: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def put_mnist(root: Path) -> None:
    """Write files in the layout of MNIST: 8 training and 4 validation images."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, num in (("train", 8), ("t10k", 4)):
        images = bytes(range(28)) * 28 * num
        for kind, content in (
            ("images-idx3", struct.pack(">iiii", 2051, num, 28, 28) + images),
            ("labels-idx1", struct.pack(">ii", 2049, num) + bytes(number % 10 for number in range(num))),
        ):
            (folder / f"{part}-{kind}-ubyte").write_bytes(content)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def test_grey_images_get_three_equal_channels(tmp_path: Path) -> None:
    put_mnist(tmp_path)
    data = load(tmp_path, "MNIST")
    image, label = data.train[3]
    assert (image.shape, label) == ((3, 28, 28), 3)
    assert image[0, 5].tolist() == list(range(28))
    assert image[0].equal(image[1])
    assert load(tmp_path, "MNIST", image_size=32).val[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_name_in_the_table_is_a_data_set(name: str, tmp_path: Path) -> None:
    """Constructing it fails only because the data are missing."""
    arguments = {"download": False} if SETS[name].downloads else {}
    for part in (SETS[name].train, SETS[name].val):
        if part is not None:
            with pytest.raises(
                (RuntimeError, FileNotFoundError), match=r"not found|corrupted|h5py|No such file|not present"
            ):
                getattr(torchvision.datasets, name)(tmp_path, **part, **arguments)


@pytest.mark.parametrize("name", [name for name in sorted(SETS) if not SETS[name].downloads])
def test_manual_download_error_says_which_file_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"^data.root: .*(csv|archive).*{tmp_path}.* torchvision cannot download this"
    ):
        load(tmp_path, name)


@pytest.mark.parametrize(
    "error", [ValueError("the address is broken"), EOFError(), ModuleNotFoundError("no gdown"), KeyboardInterrupt()]
)
def test_incomplete_download_is_not_used(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EuroSAT's own code checks only that the folder exists."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("")
    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", unpack_a_part_and(error))
    with pytest.raises((UsageError, KeyboardInterrupt)) as failed:
        load(tmp_path, "EuroSAT")
    if isinstance(error, Exception):
        assert f"cannot be downloaded ({str(error) or 'EOFError'})" in str(failed.value)
    assert len(torchvision.datasets.EuroSAT(tmp_path)) == 2
    with pytest.raises(
        UsageError, match=rf"was interrupted. Delete .* {tmp_path}/eurosat, and '.*begun'"
    ) as interrupted:
        load(tmp_path, "EuroSAT")
    assert interrupted.value.code == "download-interrupted"
    Path(interrupted.value.fields["marker"]).unlink()
    assert len(load(tmp_path, "EuroSAT", val_fraction=0.5).train) == 1  # type: ignore[arg-type]


def test_download_without_files_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dataset: Any) -> None:
        Path(dataset.root, "eurosat").mkdir(exist_ok=True)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.EuroSAT, "download", fail)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"cannot be downloaded \(no network\)"):
            load(tmp_path, "EuroSAT")


def unpack_a_part_and(error: BaseException) -> Any:
    def download(dataset: Any) -> None:
        for name in ("River", "Forest"):
            folder = Path(dataset.root, "eurosat", "2750", name)
            folder.mkdir(parents=True)
            cut("china", 1).save(folder / "0.jpg")
        raise error

    return download
