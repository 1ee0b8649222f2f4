"""The traps are traps: what each faulty build, model and data set does, in one process."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dreplica.agreement.wiring.fault import WiringError
from dreplica.commands.cases.samples import builds, data, models
from dreplica.commands.cases.samples.operators import racy_sum
from dreplica.config.schema import RunConfig
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.replica.wiring import check_wiring
from dreplica.state.fingerprint.fingerprint import fingerprint
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state

CPU = torch.device("cpu")
CONFIG = RunConfig.model_validate(
    {"model": {"factory": "dreplica.commands.cases.samples.models:tiny_cnn"}, "optim": {"name": "SGD", "lr": 0.1}}
)


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def build(function: Callable[..., Replica], rank: int, monkeypatch: pytest.MonkeyPatch) -> Replica:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    seed_generators(42)
    return function(CONFIG, 5, CPU)


def digests(model: nn.Module) -> dict[str, str]:
    return dict(fingerprint(model.state_dict()))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()


def trainable(model: nn.Module) -> dict[str, str]:
    return dict(fingerprint({name: p.detach() for name, p in model.named_parameters()}))


def test_deepcopied_optimizer_updates_neither_model() -> None:
    original = models.tiny_cnn(5)
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    model, copied = copy.deepcopy(original), copy.deepcopy(optimizer)
    before = trainable(original)
    for trained in (model, original):
        take_step(trained, copied)
    assert trainable(model) == before
    assert trainable(original) == before
    take_step(original, optimizer)
    assert trainable(original) != before


def test_model_copied_with_its_optimizer_learns() -> None:
    """A model and an optimizer copied in one call learn without the original."""
    original = models.tiny_cnn(5)
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1)
    model, copied = copy.deepcopy((original, optimizer))
    before = trainable(original)
    take_step(model, copied)
    assert trainable(model) != before
    assert trainable(original) == before


def test_deepcopied_scheduler_drives_a_copy() -> None:
    model = models.tiny_cnn(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = copy.deepcopy(torch.optim.lr_scheduler.StepLR(optimizer, step_size=1))
    assert scheduler.optimizer is not optimizer
    scheduler.optimizer.step()
    with warnings.catch_warnings(action="ignore"):  # torch misses a step of the copy, which no code asked for
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (builds.deepcopied_optimizer, "optimizer-not-bound"),
        (builds.deepcopied_model, "optimizer-not-bound"),
        (builds.head_replaced_late, "optimizer-not-bound"),
        (builds.head_left_out, "parameters-not-optimized"),
        (builds.deepcopied_scheduler, "scheduler-not-bound"),
        (builds.shared_storage, "storage-shared"),
    ],
)
def test_faulty_wiring_is_what_it_claims(function: Any, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = build(function, 0, monkeypatch)
    with pytest.raises(WiringError) as raised:
        check_wiring(replica.model, replica.optimizer, replica.scheduler)
    assert raised.value.code == cause


@pytest.mark.parametrize(
    ("function", "same_weights", "same_generator"),
    [
        (builds.deepcopied_together, True, True),
        (builds.seed_for_each_build, True, True),
        (builds.extra_layer, True, False),
        (builds.one_seed_for_two_builds, False, False),
        (builds.probed_loader, False, False),
        (builds.unseeded_head, False, False),
    ],
)
def test_what_two_ranks_build_from_one_seed(
    function: Any, same_weights: bool, same_generator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas, states = [], []
    for rank in (0, 1):
        replicas.append(build(function, rank, monkeypatch))
        states.append(torch.get_rng_state().numpy().tobytes())
    for replica in replicas:
        check_wiring(replica.model, replica.optimizer, replica.scheduler)
    one, other = replicas
    assert (digests(one.model) == digests(other.model)) is same_weights
    assert (states[0] == states[1]) is same_generator


def test_own_random_weights_leave_the_global_generators_alone() -> None:
    seed_generators(0)
    models.tiny_cnn(5)
    expected = torch.get_rng_state().numpy().tobytes(), numpy.random.get_state()[1].tobytes()
    seed_generators(0)
    one = models.own_random_weights(5)
    assert (torch.get_rng_state().numpy().tobytes(), numpy.random.get_state()[1].tobytes()) == expected
    seed_generators(0)
    assert digests(one) != digests(models.own_random_weights(5))


def test_racy_sum_differs_between_calls_by_rounding_only() -> None:
    images = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    results = [racy_sum(images) for _ in range(5)]
    assert len({result.numpy().tobytes() for result in results}) > 1
    exact = images.double().sum(dim=(2, 3))
    for result in results:
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


def test_racy_sum_is_one_operator_with_a_gradient() -> None:
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    weights = torch.arange(6.0).reshape(2, 3)
    with OpTracer() as tracer:
        (racy_sum(images) * weights).sum().backward()
    assert [record.name for record in tracer.records].count("cases.racy_sum.default") == 1
    assert tracer.records[0].name == "cases.racy_sum.default"
    assert images.grad is not None
    assert torch.equal(images.grad, weights[:, :, None, None].expand_as(images))


def test_detached_logits_move_buffers_and_nothing_else() -> None:
    model = models.detached_logits(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = trainable(model)
    buffers = dict(fingerprint(dict(model.named_buffers())))
    take_step(model, optimizer)
    assert trainable(model) == weights
    assert dict(fingerprint(dict(model.named_buffers()))) != buffers
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rank", [0, 1])
def test_eval_does_nothing_on_replica_1(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert models.stays_in_training(5).eval().training is (rank == 1)


def test_reseeding_model_freezes_global_random_draws() -> None:
    orders = []
    model = models.reseeds_every_step(5)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8))
        orders.append(torch.randperm(80).tolist())
    assert orders[0] == orders[1]


def test_noise_depends_on_the_process_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _, _ = data.noise_from_global_generator(CONFIG.data)
    numpy.random.seed(0)
    one = train[3][0]
    numpy.random.seed(0)
    assert train[3][0].numpy().tobytes() == one.numpy().tobytes()
    assert train[3][0].numpy().tobytes() != one.numpy().tobytes()


def test_altered_file_alters_one_sample_on_replica_1(monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        images.append(data.altered_file(CONFIG.data)[0].images)
    assert (images[0] != images[1]).flatten(1).any(dim=1).nonzero().flatten().tolist() == [7]
