"""The training loop synchronizes with the GPU no more often than a loop without checks."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.commands.bench.loops import Bench
from dreplica.config.load import load_config
from dreplica.config.schema import DataConfig, RunConfig, TrainConfig
from dreplica.data.cache.device_cache import DeviceImageStore
from dreplica.data.datasets import load_data
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.samples import TensorImages
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.replica.build import build_replica
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.state.snapshot import restore_snapshot, take_snapshot
from dreplica.state.tensors import to_device
from dreplica.training.evaluate import evaluate
from dreplica.training.events import StepDone
from dreplica.training.history import History
from dreplica.training.loop import train
from dreplica.training.step import make_scaler, training_step
from tests.fixtures import SMALL, merged, tiny_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda:0")
WORLD = World(0, 1, Channel(), None, "here")


def bytes_of_images(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    """Return the small images as uint8, which are normalized on the device."""
    train_set, val, num_classes = tiny_images(config)
    return _as_bytes(train_set), _as_bytes(val), num_classes


def _as_bytes(images: TensorImages) -> TensorImages:
    return TensorImages((40 * images.images + 128).clamp(0, 255).to(torch.uint8), images.labels)


@pytest.fixture(autouse=True)
def waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def configured(*arguments: str) -> RunConfig:
    return load_config(merged(*SMALL, "--data.batch_size=8", *arguments), 1)


def built(config: RunConfig) -> Replica:
    seed_generators(42)
    replica = build_replica(config, 5, DEVICE)
    replica.scaler = make_scaler(config.train, DEVICE)
    return replica


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--train.amp=bf16", "--model.channels_last=true"),
        ("--data.name=tests.gpu.test_loop:bytes_of_images",),
        ("--train.accumulate=2", "--train.grad_clip=1.0"),
        ("--optim.name=AdamW", "--optim.lr=1e-3"),
        ("--data.num_workers=2",),
    ],
    ids=["plain", "bf16 channels_last", "uint8", "accumulate", "AdamW", "workers"],
)
def test_steps_checks_and_snapshots_do_not_synchronize(arguments: tuple[str, ...]) -> None:
    """Waiting for the digests of the step before is allowed; torch's debug mode does not see it."""
    config = configured(*arguments, "--agreement.snapshot_every=3")
    replica, data = built(config), load_data(config.data)
    agreement = Agreement(replica.model, replica.optimizer, lag=1)
    history = History(replica, config.agreement.snapshot_every)
    coordinator = IndexSampler(WORLD.channel, 0)
    events = train(replica, data, coordinator, agreement, config, WORLD, DEVICE, StopRequest(), history)
    steps = 0
    for event in events:
        if isinstance(event, StepDone):
            steps += 1
            steady = event.epoch == 2 and 3 <= event.step_in_epoch < event.steps_in_epoch
            torch.cuda.set_sync_debug_mode("error" if steady else "default")
    assert (steps, agreement.agreed_until) == (20, 20)


def test_evaluation_synchronizes_at_its_end() -> None:
    config = configured()
    replica, data = built(config), load_data(config.data)
    agreement = Agreement(replica.model, replica.optimizer)

    def run() -> Any:
        coordinator = IndexSampler(WORLD.channel, 0)
        return evaluate(replica, data.val, coordinator, DEVICE, 8, 0, config.train, hasher=agreement.hasher)

    first = run()  # tables are made
    torch.cuda.set_sync_debug_mode("error")
    second = run()
    torch.cuda.set_sync_debug_mode("default")
    assert second.logits.numpy().tobytes() == first.logits.numpy().tobytes()
    assert (second.batches, second.tally.correct.item()) == (first.batches, first.tally.correct.item())
    assert second.labels.equal(data.val.labels)


def test_scaler_is_saved_without_waiting_and_restored() -> None:
    config = configured("--train.amp=fp16")
    replica, data = built(config), load_data(config.data)
    batch = next(iter(_batches(config, data.train)))
    for _ in range(2):
        training_step(replica, batch, config.train)
    assert replica.scaler is not None
    torch.cuda.set_sync_debug_mode("error")
    snapshot = take_snapshot(replica)
    torch.cuda.set_sync_debug_mode("default")
    before = replica.scaler.state_dict()
    training_step(replica, replace(batch, inputs=batch.inputs * float("inf")), config.train)
    assert replica.scaler.state_dict() != before
    restore_snapshot(replica, snapshot)
    assert replica.scaler.state_dict() == before


def _batches(config: RunConfig, dataset: Any) -> Any:
    from dreplica.data.loading.loader import load_batches

    stream = IndexSampler(WORLD.channel, 0).training_batches(len(dataset), config.data.batch_size, 1)
    return load_batches(dataset, stream, DEVICE, 0, 0, 1)


def test_copies_to_the_device_are_asynchronous() -> None:
    store = DeviceImageStore(64, 8, DEVICE)
    # To get pinned memory, or to load a kernel, may wait the first time; both are kept.
    pinned = [torch.empty(1000, dtype=torch.int64).pin_memory() for _ in range(60)]
    store.images.index_select(0, to_device(torch.arange(8), DEVICE))
    del pinned
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    behind = torch.cuda.Event()
    behind.record()
    torch.cuda.set_sync_debug_mode("error")
    values = [to_device(torch.full((1000,), number), DEVICE) for number in range(50)]
    images = store.images.index_select(0, to_device(torch.arange(8), DEVICE))
    assert not behind.query()
    torch.cuda.set_sync_debug_mode("default")
    assert [int(value.sum()) for value in values] == [1000 * number for number in range(50)]
    assert images.shape == (8, 3, 8, 8)


def test_memory_used_by_checks() -> None:
    settings = ["--data.name=tests.gpu.models:noise", "--data.batch_size=16", "--schedule={}"]
    bench = Bench(load_config([*settings, "--model.name=resnet18"], 1), WORLD, DEVICE, steps=2)
    memory = bench.measure(rounds=2).memory
    assert memory is not None
    assert memory.checks < 16e6
    assert memory.snapshot > 0


class Net(nn.Module):
    """A module with named parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.conv(inputs).relu().flatten(1))


def test_backward_is_traced_in_autograd_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    replica = Replica(model, nn.CrossEntropyLoss(), optimizer)
    config = configured()
    (batch, *_) = _batches(config, load_data(config.data).train)
    snapshot = take_snapshot(replica)
    traces = []
    for _ in range(2):
        restore_snapshot(replica, snapshot)
        with OpTracer(optimizer, model=model) as tracer:
            training_step(replica, batch, TrainConfig())
        traces.append(tracer.records)
    assert traces[0] == traces[1]
    found = {(record.name, record.module, record.phase) for record in traces[0]}
    assert ("aten.convolution_backward.default", "conv", "backward") in found
    assert ("aten.convolution.default", "conv", "forward") in found
    assert {phase for _, _, phase in found} == {"forward", "backward", "optimizer"}
