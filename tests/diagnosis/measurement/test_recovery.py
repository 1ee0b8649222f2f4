"""The original tensors of a GPU's step, which a later step has overwritten, are recovered from their digests."""

import torch
from torch import Tensor

from dreplica.diagnosis.evidence.aftermath import Aftermath
from dreplica.diagnosis.measurement.original_step import _recover
from dreplica.state.fingerprint import multilinear
from dreplica.state.stages import Stage

WEIGHTS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}


def stage_of(tensors: dict[str, Tensor]) -> Stage:
    digests = [
        multilinear.digest(name.encode(), each.reshape(-1).view(torch.uint8).numpy()) for name, each in tensors.items()
    ]
    return Stage(tuple(tensors), b"".join(digests))


def changed(**elements: tuple[int, float]) -> dict[str, Tensor]:
    tensors = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    for name, (index, value) in elements.items():
        tensors[name].view(-1)[index] = value
    return tensors


def recovered(original: dict[str, Tensor], known: Aftermath | None = None) -> Aftermath:
    replayed = Aftermath({"weights": WEIGHTS})
    return _recover(known or Aftermath({}), replayed, stage_of(original), stage_of(WEIGHTS), "weights")


def test_recover_adds_the_tensors_of_the_stage() -> None:
    original = changed(a=(7, -7.0))
    found = recovered(original).tensors["weights"]
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in original.items()}
    assert WEIGHTS["a"][1, 3] == 7.0, "the replayed tensor is not changed"


def test_recover_adds_nothing_where_more_differs() -> None:
    for original in (changed(a=(7, -7.0), b=(0, 2.0)), {"a": WEIGHTS["a"] * 2, "b": WEIGHTS["b"]}):
        assert recovered(original).tensors == {}


def test_recover_keeps_tensors_that_are_known() -> None:
    known = Aftermath({"weights": changed(b=(1, 5.0))})
    assert recovered(changed(a=(7, -7.0)), known) is known
