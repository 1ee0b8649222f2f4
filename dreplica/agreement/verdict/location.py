"""Where replicas part first, and the verdict as far as the comparison alone can tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dreplica.agreement.verdict.verdict import Verdict, split_into_classes, suspects_of
from dreplica.state.fingerprint.stage import STAGES, Stage

_CAUSE_OF_STAGE = {"indices": "indices-differ", "batch": "batch-differs", "predictions": "evaluation-differs"}

_SEED_ALL = (
    "random.seed(42); numpy.random.seed(42); torch.manual_seed(42)  # on every replica, just before the build",
    "build the model without a draw that depends on the rank",
)

_DDP = (
    "make no code that sets requires_grad, writes to parameters or steps the optimizer depend on the rank",
    "call the wrapped model, not model.module, and the last backward pass outside of no_sync()",
)
_DDP_BUFFERS = (
    "DistributedDataParallel(model)  # its default for buffers: rank 0's on all ranks before each forward pass",
    "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # statistics of the whole batch; before wrapping it",
    'Agreement(model, optimizer, stages=("gradients", "optimizer", "weights"))  # if each rank is to have its own',
)


@dataclass(frozen=True)
class Place:
    """Where replicas part first, and the classes they fall into there."""

    step: int
    """The step compared; where replicas are at different steps, the earliest."""
    stage: str | None
    """The first differing stage in causal order; None if replicas are at different steps."""
    tensor: str | None
    """The stage's first entry that differs or that some replica lacks; None if there is none, that is, if replicas have
    the same entries in different orders, or an empty stage against none."""
    classes: list[list[int]]
    num_differing: int
    """How many of the stage's entries differ, or are missing somewhere."""
    num_entries: int
    """How many entries the stage has on all replicas together."""
    differing_stages: list[str]
    only_on: dict[str, list[int]]
    """The stage's entries that only some replicas have, and which."""
    phase: str | None = None
    """`evaluation`, where that is what was compared."""
    stage_classes: dict[str, list[list[int]]] = field(default_factory=dict)
    """Every stage compared, in causal order, with its classes."""

    @property
    def is_structural(self) -> bool:
        """Whether replicas differ in what there is to compare, rather than in its values."""
        return self.tensor is None or bool(self.only_on)

    @property
    def when(self) -> str:
        """The step, in words."""
        if self.phase is not None:
            return f"in the {self.phase} after step {self.step}"
        return "at the build (step 0)" if self.step == 0 else f"at step {self.step}"

    @property
    def where(self) -> str:
        """Stage and tensor, in words."""
        return ", ".join(part for part in (self.stage, self.tensor) if part) or "the number of steps taken"


def first_difference(
    steps: Sequence[int], stages: Sequence[Mapping[str, Stage]], phases: Sequence[str | None] | None = None
) -> Place:
    """Where replicas part first, given what each of them compared, by replica id.

    `phases`: `evaluation` for a replica that compared one; by default none did.
    """
    step = min(steps)
    moments = list(zip(steps, phases or [None] * len(steps), strict=True))
    if len(set(moments)) > 1:
        return Place(step, None, None, split_into_classes([repr(each).encode() for each in moments]), 0, 0, [], {})
    digests = {name: [row[name].digest if name in row else b"" for row in stages] for name in STAGES}
    differing_stages = [name for name in STAGES if len(set(digests[name])) > 1]
    assert differing_stages, "the words differ, so some stage does"
    stage = differing_stages[0]
    rows = [row[stage].entries() if stage in row else {} for row in stages]
    everything = list(dict.fromkeys(name for row in rows for name in row))
    differing = [name for name in everything if len({row.get(name) for row in rows}) > 1]
    owners = {name: [replica for replica, row in enumerate(rows) if name in row] for name in differing}
    return Place(
        step=step,
        stage=stage,
        tensor=differing[0] if differing else None,
        classes=split_into_classes(digests[stage]),
        num_differing=len(differing),
        num_entries=len(everything),
        differing_stages=differing_stages,
        only_on={name: replicas for name, replicas in owners.items() if len(replicas) < len(rows)},
        phase=moments[0][1],
        stage_classes={name: split_into_classes(digests[name]) for name in STAGES if any(digests[name])},
    )


def describe(place: Place, epoch: int | None, num_replicas: int, ddp: bool = False) -> Verdict:
    """The verdict as far as the comparison alone can tell: where, and who; the cause only where the stage says it.

    `ddp`: whether replicas are the ranks of one data-parallel model.
    """
    suspects = suspects_of(place.classes)
    evidence = _evidence(place)
    if not suspects:
        evidence.append(f"{num_replicas} replicas without a majority: the comparison alone cannot say who is wrong")
    cause = _CAUSE_OF_STAGE.get(place.stage or "", "unexplained")
    remedy: tuple[str, ...] = _SEED_ALL if place.step == 0 and place.tensor and not place.only_on else ()
    if ddp and place.stage is not None:
        remedy = _DDP_BUFFERS if place.stage == "buffers" else _DDP
    return Verdict(
        agreed=False,
        cause="structure-differs" if place.is_structural else cause,
        summary=f"replicas parted {place.when}: {place.where}; classes {place.classes}",
        step=place.step,
        epoch=epoch,
        stage=place.stage,
        tensor=place.tensor,
        module=module_of(place.stage, place.tensor),
        phase=place.phase,
        suspects=suspects,
        classes=place.classes,
        evidence=evidence,
        remedy=list(remedy),
        stage_classes=place.stage_classes,
    )


def describe_algorithms(step: int, algorithms: Sequence[str]) -> Verdict:
    """The verdict where replicas take fingerprints by different functions: nothing is known of their state."""
    classes = split_into_classes([algorithm.encode() for algorithm in algorithms])
    return Verdict(
        agreed=False,
        cause="environment-differs",
        summary=f"replicas take fingerprints by different functions, which cannot be compared; classes {classes}",
        step=step,
        suspects=suspects_of(classes),
        classes=classes,
        evidence=[f"replicas {ids}: {algorithms[ids[0]]}" for ids in classes],
        remedy=["dreplica.Agreement(..., hasher=dreplica.Hasher())  # on every replica: all on the CPU"],
    )


def _evidence(place: Place) -> list[str]:
    if place.stage is None:
        return ["replicas compare different steps: some took a step, or an evaluation, that others did not"]
    count = f"{place.num_differing} of {place.num_entries} entries of {place.stage} differ"
    if place.tensor is not None:
        evidence = [f"{count}, first {place.tensor}"]
    else:
        evidence = [f"{count}: they come in different orders, or some replicas have no such stage"]
    evidence.append(f"differing stages: {', '.join(place.differing_stages)}")
    if place.only_on:
        some = [f"{name} only on replicas {ids}" for name, ids in list(place.only_on.items())[:5]]
        evidence.append(f"{len(place.only_on)} entries exist on some replicas only: {'; '.join(some)}")
    return evidence


def module_of(stage: str | None, tensor: str | None) -> str | None:
    """The module path that a parameter's or buffer's name begins with."""
    if tensor is None or stage not in {"weights", "gradients", "buffers"} or "." not in tensor:
        return None
    return tensor.rpartition(".")[0]
