"""`overrides` as a tool: two settings in lock-step, and where the one first rounds otherwise than the other.

Whether two settings round alike depends on the processor, so each test measures it: a bare loop takes the
same steps under both settings, and what it sees is what the job must say.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreplica.config.load import load_config
from dreplica.data.datasets import load_data
from dreplica.data.loading.index_stream import draw_order
from dreplica.distributed.process_group import World
from dreplica.environment.determinism import apply_determinism
from dreplica.replica.build import build_replica
from dreplica.state.rng import seed_generators
from tests.fixtures import merged
from tests.harness import Job, run_job, run_replicas
from tests.messages import codes, data_of, text_of, texts

BASE = (
    "--data.name=tests.fixtures:tiny_images",
    "--model.factory=tests.fixtures:tiny_model",
    "--data.batch_size=20",
    "--train.epochs=1",
    "--schedule={}",
    "--optim={name: SGD, momentum: 0.9}",
)
STEPS = 4


@dataclass(frozen=True)
class Steps:
    """What a bare loop saw."""

    states: list[dict[str, bytes]]
    """After each step: logits, loss, gradients, weights, buffers and the optimizer's tensors."""
    outputs: dict[str, Tensor]
    """Each leaf module's output in the first step, in the order of the calls."""


def bare_steps(world: World, arguments: tuple[str, ...]) -> Steps:
    """Trains as this replica's config says, without the trainer."""
    config = load_config(merged(*arguments), world.num_replicas).for_replica(world.replica_id)
    apply_determinism(config.determinism)
    data = load_data(config.data)
    seed_generators(config.seed.model)
    replica = build_replica(config, data.num_classes, torch.device("cpu"))
    model, optimizer = replica.model.train(), replica.optimizer
    outputs: dict[str, Tensor] = {}
    handles = []
    if not config.model.compile:  # of compiled code the modules' outputs are not seen
        for name, module in model.named_children():
            handles.append(module.register_forward_hook(partial(_keep, outputs, name)))
    states = []
    for indices in draw_order(len(data.train), config.seed.data, 1).split(config.data.batch_size):
        images = torch.stack([data.train[int(index)][0] for index in indices])
        labels = torch.tensor([int(data.train[int(index)][1]) for index in indices])
        if config.model.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.amp is not None):
            logits = model(images)
            loss = replica.criterion(logits, labels)
        loss.backward()
        if config.train.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        state = {"logits": logits, "loss": loss, **dict(model.named_parameters()), **dict(model.named_buffers())}
        state |= {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
        for number, row in enumerate(optimizer.state.values()):
            state |= {f"{number}.{key}": value for key, value in row.items() if isinstance(value, Tensor)}
        states.append({name: raw(tensor) for name, tensor in state.items()})
    for handle in handles:
        handle.remove()
    return Steps(states, outputs)


def _keep(outputs: dict[str, Tensor], name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
    outputs.setdefault(name, output.detach().clone())


def raw(tensor: Tensor) -> bytes:
    return str(tensor.dtype).encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def first_step_apart(one: Steps, other: Steps) -> int | None:
    pairs = zip(one.states, other.states, strict=True)
    return next((step for step, (a, b) in enumerate(pairs, start=1) if a != b), None)


def largest_ulp(one: Tensor, other: Tensor) -> int:
    """How many float32 numbers lie between the two, at most."""
    assert one.dtype == other.dtype == torch.float32
    places = [t.contiguous().view(torch.int32).to(torch.int64) for t in (one, other)]
    ordered = [torch.where(place < 0, -(place & 0x7FFFFFFF), place) for place in places]
    return int((ordered[0] - ordered[1]).abs().max())


def compare(setting: str, *extra: str) -> tuple[Job, Steps, Steps]:
    """The job with `setting` on replica 1, and the bare loops of both."""
    arguments = (*BASE, *extra, f"--overrides={{1: {setting}}}")
    one, other = run_replicas(bare_steps, 2, arguments)
    assert isinstance(one, Steps), one
    assert isinstance(other, Steps), other
    return run_job(*arguments), one, other


def verdict_of(job: Job, step: int | None) -> dict[str, Any] | None:
    """The verdict on settings that diverge at `step`; None, and the job must have agreed, where they do not."""
    verdict = job.report["verdict"]
    if step is None:
        assert (job.returncode, verdict["cause"]) == (0, "none"), job.output
        assert job.report["steps_checked"] == STEPS
        return None
    assert set(job.exitcodes.values()) == {3}, job.output
    assert (verdict["cause"], verdict["agreed"]) == ("declared-override", False), job.output
    assert (verdict["step"], verdict["suspects"], verdict["groups"]) == (step, [1], [[0], [1]])
    return verdict


ROUNDS = [
    "{determinism: {threads: 2}}",
    "{determinism: {onednn: false}}",
    "{model: {channels_last: true}}",
    "{model: {compile: eager}}",
    "{model: {compile: aot_eager}}",
    "{train: {grad_clip: 1e9}}",
]
"""Settings that use other kernels, or other operators around them, for the same numbers."""


@pytest.mark.parametrize("setting", ROUNDS)
def test_first_differing_operator_and_distance_are_named(setting: str) -> None:
    job, one, other = compare(setting)
    verdict = verdict_of(job, first_step_apart(one, other))
    if verdict is None or verdict["step"] > 1:
        return
    evidence = " ".join(texts(verdict["evidence"]))
    assert setting.strip("{}").replace(": {", ".").split(":")[0] in evidence
    assert verdict["operator"].startswith("aten.")
    if "structure-diverges" in codes(verdict["evidence"]):
        return
    (ulp,) = re.findall(r"output 0: .* at most (\d+) ULP apart", evidence)
    apart = [name for name in one.outputs if raw(one.outputs[name]) != raw(other.outputs.get(name, one.outputs[name]))]
    if apart:
        assert (verdict["module"], verdict["phase"]) == (apart[0], "forward")
        assert int(ulp) == largest_ulp(one.outputs[apart[0]], other.outputs[apart[0]])
    else:
        assert verdict["phase"] == "backward"
        gradient = f"{verdict['module']}.weight.grad"
        assert one.states[0][gradient] != other.states[0][gradient]
        assert int(ulp) > 0


STRUCTURE = [
    # Each setting adds operators. The first is reported, and neither the model nor the hardware is blamed.
    ("{train: {amp: bf16}}", "aten._to_copy.default", "forward"),
    ("{optim: {name: AdamW, foreach: true}}", "", "optimizer"),
    ("{train: {grad_clip: 1e-3}}", "aten._foreach_norm.Scalar", "optimizer"),
]


@pytest.mark.parametrize(("setting", "operator", "phase"), STRUCTURE)
def test_override_of_structure_names_the_operator(setting: str, operator: str, phase: str) -> None:
    job, one, other = compare(setting)
    step = first_step_apart(one, other)
    assert step == 1
    verdict = verdict_of(job, step)
    line = text_of(verdict["evidence"], "structure-diverges")
    assert operator in line
    assert line.count(f"({phase})") == 2
    assert verdict["phase"] == phase


def test_override_of_optimizer_in_compiled_model() -> None:
    """Compiled code calls other operators, or outside modules, but gives the same results up to the learning rate."""
    job, one, other = compare("{model: {compile: aot_eager}, optim: {lr: 0.02}}")
    verdict = verdict_of(job, first_step_apart(one, other))
    assert verdict is not None
    if verdict["stage"] != "optimizer":  # A processor on which compiled code rounds differently.
        assert "structure-diverges" in codes(verdict["evidence"])
        return
    assert verdict["operator"] is None
    assert data_of(verdict["evidence"], "operator-unrelated")["stage"] == "optimizer"


@pytest.mark.parametrize("optimizer", ["SGD, momentum: 0.9", "AdamW"])
@pytest.mark.parametrize("setting", ["foreach: true", "foreach: false"])
def test_optimizer_implementation_diverges_only_if_rounding(optimizer: str, setting: str) -> None:
    job, one, other = compare(f"{{optim: {{{setting}}}}}", f"--optim={{name: {optimizer}}}")
    verdict_of(job, first_step_apart(one, other))


def test_suspect_is_the_override_that_changes_rounding() -> None:
    arguments = (*BASE, "--overrides={1: {train: {grad_clip: 1e9}}, 2: {determinism: {onednn: false}}}")
    plain, clipped, native = run_replicas(bare_steps, 3, arguments)
    assert first_step_apart(plain, clipped) is None
    job = run_job(*arguments, num_replicas=3)
    verdict = job.report["verdict"]
    if first_step_apart(plain, native) is None:
        assert verdict["cause"] == "none"
        return
    assert (verdict["cause"], verdict["groups"]) == ("declared-override", [[0, 1], [2]]), job.output
    assert verdict["suspects"] == [2]


def test_fault_is_not_blamed_on_a_harmless_override() -> None:
    fault = "--inject=[{replica: 0, step: 3, target: weights}]"
    job = run_job(*BASE, fault, "--overrides={1: {model: {compile: eager}}}")
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["suspects"]) == ("transient-fault", 3, [0]), job.output


# ---- continuing after a divergence


def distances(job: Job) -> list[dict[str, Any]]:
    assert set(job.exitcodes.values()) == {3}, job.output
    return job.report["distance"]


def test_distance_grows_from_the_divergent_epoch() -> None:
    """One bit of a weight flips at the end of the last step of epoch 2: a power of two and nothing else, at first."""
    last = 2 * STEPS
    fault = f"--inject=[{{replica: 1, step: {last}, target: weights, tensor: 0.weight, seed: 1}}]"
    job = run_job(*BASE, "--train.epochs=4", fault, "--agreement.on_divergence=continue")
    rows = distances(job)
    assert [row["epoch"] for row in rows] == [2, 3, 4]
    for row in rows:
        assert [row[stage]["l2"][0] for stage in ("weights", "buffers", "optimizer")] == [0.0, 0.0, 0.0]
        assert [row[stage]["max_ulp"][0] for stage in ("weights", "buffers", "optimizer")] == [0, 0, 0]
    first, *later = rows
    ulp = first["weights"]["max_ulp"][1]
    assert ulp > 0
    assert ulp.bit_count() == 1, "one bit, not the sign"
    assert first["weights"]["l2"][1] > 0
    for stage in ("buffers", "optimizer"):
        assert (first[stage]["max_ulp"][1], first[stage]["l2"][1]) == (0, 0.0)
        assert all(row[stage]["max_ulp"][1] > 0 < row[stage]["l2"][1] for row in later)
    assert job.report["steps_checked"] == 4 * STEPS


def test_distance_of_overrides_is_recorded_from_epoch_1() -> None:
    setting = "{determinism: {onednn: false}}"
    one, other = run_replicas(bare_steps, 2, (*BASE, f"--overrides={{1: {setting}}}"))
    job = run_job(*BASE, "--train.epochs=3", f"--overrides={{1: {setting}}}", "--agreement.on_divergence=continue")
    if first_step_apart(one, other) is None:
        assert job.report["verdict"]["cause"] == "none"
        return
    rows = distances(job)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    parameters = [key.removesuffix(".grad") for key in one.states[-1] if key.endswith(".grad")]
    pairs = [[tensor_of(side.states[-1][name]) for side in (one, other)] for name in parameters]
    assert rows[0]["weights"]["max_ulp"] == [0, max(largest_ulp(*pair) for pair in pairs)]
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    assert rows[0]["weights"]["l2"] == [0.0, pytest.approx(squares**0.5, rel=1e-12)]
    norms = [row["weights"]["l2"][1] for row in rows]
    assert norms[0] < norms[1] < norms[2]


def tensor_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content.removeprefix(b"torch.float32")), dtype=torch.float32)


def test_distance_of_complex_weights() -> None:
    fault = f"--inject=[{{replica: 1, step: {STEPS}, target: weights, tensor: filter}}]"
    model = "--model.factory=tests.end_to_end.zoo:Complex"
    (row,) = distances(run_job(*BASE, model, fault, "--agreement.on_divergence=continue"))
    assert row["weights"]["l2"][1] > 0
