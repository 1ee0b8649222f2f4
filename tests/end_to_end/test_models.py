"""Models of every kind: sound replicas agree to the end, and a fault injected into one is found, and nothing else.

Each model has three jobs: one without a fault; one that continues after a flipped bit, in which the other replicas end
in the same state as without it; and one with a module corrupted at every step.
"""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.harness import Job, run_job

ZOO = "tests.end_to_end.zoo"
BASE = (
    "--data.name=tests.fixtures:tiny_images",
    "--data.batch_size=20",
    "--train.epochs=1",
    "--schedule={}",
    "--optim.momentum=0.9",
    "--optim.lr=0.05",
)
STEPS = 4
"""In an epoch."""


@dataclass(frozen=True)
class Kind:
    """A model, and where faults are injected."""

    arguments: tuple[str, ...]
    module: str
    """A module whose whole output counts."""
    weight: str
    stage: str = "output"
    """Stage in which the corrupted module is first visible."""
    phase: str = "forward"


def factory(name: str, *places: str, **more: str) -> Kind:
    return Kind((f"--model.factory={ZOO}:{name}",), *places, **more)


def replica(name: str, *places: str) -> Kind:
    return Kind((f"--replica.factory={ZOO}:{name}",), *places)


TINY = "--model.factory=tests.fixtures:tiny_model"
COMPILED = {
    "model.compile eager": Kind((TINY, "--model.compile=eager"), "0", "1.weight"),
    "model.compile aot_eager": Kind((TINY, "--model.compile=aot_eager"), "0", "0.weight"),
    "compiled_in_place": factory("compiled_in_place", "0", "5.bias"),
    "compiled_wrapper": factory("compiled_wrapper", "0", "0.weight"),
}
"""Compiled whole."""
PLAIN = {
    "compiled_part": factory("compiled_part", "4", "0.weight"),
    "CustomFunction": factory("CustomFunction", "head", "body.0.weight"),
    "InPlace": factory("InPlace", "conv", "conv.weight", stage="buffers"),
    "TiedWeights": factory("TiedWeights", "decoder", "between.weight"),
    "no_batch_norm": factory("no_batch_norm", "0", "1.weight"),
    "frozen_trunk": factory("frozen_trunk", "5", "0.weight"),
    "checkpointed": factory("checkpointed", "block.0", "block.1.bias", stage="buffers"),
    # The re-entrant form computes without gradients first: the module is corrupted when it runs again, in the backward.
    "checkpointed_reentrant": factory(
        "checkpointed_reentrant", "block.0", "block.1.bias", stage="buffers", phase="backward"
    ),
    "Noisy": factory("Noisy", "head", "head.bias"),
    "Attention": factory("Attention", "head", "attention.in_proj_weight"),
    "Recurrent": factory("Recurrent", "head", "lstm.weight_hh_l1_reverse"),
    "parametrized": factory("parametrized", "0", "6.parametrizations.weight.original"),
    "Complex": factory("Complex", "head", "filter"),
    "UsedTwice": factory("UsedTwice", "again", "again.weight", stage="buffers"),
    "SharedModules": factory("SharedModules", "blocks.1", "blocks.0.weight"),
    "FunctionalCall": factory("FunctionalCall", "head", "head.weight"),
    "hooked": factory("hooked", "5", "0.weight"),
    "sparse_replica": replica("sparse_replica", "embedding", "embedding.weight"),
    "penalty_replica": replica("penalty_replica", "0", "5.weight"),
}
VIEW = {"ViewOfInput": factory("ViewOfInput", "scale", "scale.factor", stage="batch")}
ALL = COMPILED | PLAIN | VIEW


def verdict_of(job: Job) -> dict[str, Any]:
    assert set(job.exitcodes.values()) == {3}, job.output
    return job.report["verdict"]


def found(job: Job, *fields: str) -> tuple[Any, ...]:
    verdict = verdict_of(job)
    return tuple(verdict[field] for field in ("cause", "step", "suspects", *fields))


def digests_of(job: Job, stage: str) -> list[str]:
    return [line["digests"][stage] for line in job.trace_rows if stage in line["digests"]]


def flip(kind: Kind, *arguments: str) -> Job:
    """Run a job that continues after one bit is flipped on replica 1 of three at step 3."""
    fault = f"--inject=[{{replica: 1, step: 3, target: weights, tensor: {kind.weight!r}}}]"
    return run_job(*BASE, *kind.arguments, fault, "--agreement.on_divergence=continue", *arguments, num_replicas=3)


@pytest.mark.parametrize("name", ALL)
def test_sound_replicas_agree_and_flipped_bit_is_found(name: str) -> None:
    """Two sound replicas agree; one flipped bit is found without changing the others.

    The run goes on, so the original weights are gone when it is examined, and with them the number of flipped bits.
    """
    kind = ALL[name]
    sound, flipped = run_job(*BASE, *kind.arguments), flip(kind)
    assert sound.returncode == 0, sound.output
    report = sound.report
    assert (report["verdict"]["cause"], report["verdict"]["agreed"]) == ("none", True)
    assert report["steps_checked"] == flipped.report["steps_checked"] == STEPS
    assert len(set(digests_of(sound, "weights"))) == 1 + STEPS, "it learned"
    assert found(flipped, "stage", "tensor") == ("unexplained", 3, [1], "weights", kind.weight), flipped.output
    one, *others = ({**row, "replica": None} for row in report["fingerprints"] + flipped.report["fingerprints"])
    assert [other == one for other in others] == [True, True, False, True]


@pytest.mark.parametrize("name", ["compiled_in_place", "Noisy", "checkpointed", "Recurrent", "penalty_replica"])
def test_diagnosis_of_flipped_bit_changes_nothing_on_its_replica(name: str) -> None:
    kind = ALL[name]
    probed, unprobed = flip(kind), flip(kind, "--agreement.snapshot_every=0")
    assert found(unprobed, "stage", "tensor") == ("unexplained", 3, [1], "weights", kind.weight), unprobed.output
    for key in ("fingerprints", "epochs", "distance"):
        assert probed.report[key] == unprobed.report[key]


def corrupt(kind: Kind, module: str | None = None) -> Job:
    module = module or kind.module
    fault = f"--inject=[{{replica: 2, step: 3, target: activation, tensor: {module!r}, bits: 8, repeat: true}}]"
    return run_job(*BASE, *kind.arguments, fault, num_replicas=3)


@pytest.mark.parametrize("name", PLAIN | VIEW)
def test_a_module_that_computes_wrongly_is_named(name: str) -> None:
    kind = ALL[name]
    job = corrupt(kind)
    # Of a model of which a part is compiled, module paths are not known: see ModulePaths.
    module = "" if name == "compiled_part" else kind.module
    expected = ("persistent-fault", 3, [2], kind.stage, module, kind.phase)
    assert found(job, "stage", "module", "phase") == expected, job.output
    assert verdict_of(job)["operator"].startswith("aten.")


@pytest.mark.parametrize(
    "name",
    ["model.compile eager", "compiled_in_place", "model.compile aot_eager", "compiled_wrapper"],
)
def test_a_module_that_computes_wrongly_inside_compiled_code(name: str) -> None:
    """Its operator is named, without a path."""
    job = corrupt(COMPILED[name])
    expected = ("persistent-fault", 3, [2], "buffers", "aten.convolution.default")
    assert found(job, "stage", "operator") == expected, job.output


@pytest.mark.parametrize(
    "module",
    ["embed", "project"],
)
def test_a_module_whose_output_is_read_through_views_is_named(module: str) -> None:
    job = corrupt(PLAIN["Attention"], module)
    assert found(job, "module") == ("persistent-fault", 3, [2], module), job.output


@pytest.mark.parametrize(
    "name", ["model.compile eager", "TiedWeights", "frozen_trunk", "parametrized", "sparse_replica"]
)
def test_a_weight_that_changes_at_every_step(name: str) -> None:
    kind = ALL[name]
    fault = f"--inject=[{{replica: 0, step: 2, target: weights, tensor: {kind.weight!r}, repeat: true}}]"
    job = run_job(*BASE, *kind.arguments, fault, num_replicas=3)
    assert found(job, "stage", "tensor") == ("persistent-fault", 2, [0], "weights", kind.weight), job.output


def test_code_that_inductor_made_is_replayed_as_it_ran() -> None:
    """By the second epoch it has seen two batch sizes, and the first steps were taken when it had seen one."""
    fault = "--inject=[{replica: 1, step: 7, target: weights}]"
    model = (f"--model.factory={ZOO}:BatchSums", "--model.compile=true")
    job = run_job(*BASE, *model, "--data.batch_size=30", "--train.epochs=3", fault, num_replicas=3)
    assert found(job, "stage") == ("transient-fault", 7, [1], "weights"), job.output
