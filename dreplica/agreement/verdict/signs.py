"""Signs: what a comparison shows of the entries that differ, from which remedies follow."""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

from dreplica.state.fingerprint.stage import ABSENT, STAGES, Stage

Rows = Sequence[Mapping[str, Stage]]
"""The stages that each replica compared, by replica id."""


class Sign(StrEnum):
    """What a comparison shows of the first stage that differs, and of the run. Most signs come with entry names."""

    BUILD = "build"
    """The state before the first step differs."""
    LATER = "later"
    """The state after a step, or an evaluation, differs."""
    LIBRARY = "library"
    """The comparison was made in a custom training loop, and no diagnosis follows."""
    DDP = "ddp"
    """The replicas are the ranks of one data-parallel model."""
    WRAPPED = "wrapped"
    """The model is wrapped in DistributedDataParallel, or in a wrapper that averages gradients as it does."""
    MOST_ENTRIES = "most-entries"
    """Three quarters of the stage's entries differ; in the stage `optimizer`, of those of the model's parameters."""
    FEW_ENTRIES = "few-entries"
    """Fewer entries differ."""
    ONE_SIDED = "one-sided"
    """Entries that only some replicas have."""
    FROZEN = "frozen"
    """Parameters that require a gradient on some replicas only."""
    NO_GRADIENT = "no-gradient"
    """Parameters that have a gradient on some replicas only."""
    SETTING = "setting"
    """Settings of parameter groups: learning rate, weight decay, momentum."""
    METRIC = "metric"
    """What a scheduler keeps of the metric that it is stepped with."""
    SCHEDULE_POSITION = "schedule-position"
    """The number of steps that a scheduler has taken."""
    SCHEDULER = "scheduler"
    """Other state of a scheduler."""
    LOSS_SCALE = "loss-scale"
    """The scale of a GradScaler."""
    SCALER_COUNT = "scaler-count"
    """The number of steps since a GradScaler last changed its scale."""
    SCALER_SETTING = "scaler-setting"
    """A setting of a GradScaler."""
    STATE = "state"
    """Tensors that the optimizer keeps for the model's parameters."""
    STEP_COUNT = "step-count"
    """The number of steps that the optimizer has taken."""
    COUNTS_STEPS = "counts-steps"
    """The optimizer keeps the number of its steps."""
    KEEPS_STATE = "keeps-state"
    """The optimizer keeps tensors for the model's parameters, so that a step that is left out shows in them."""
    OUTSIDE_PARAMETERS = "outside-parameters"
    """Parameters that the optimizer has and the model does not have, such as those of a loss."""
    OTHER_OBJECT = "other-object"
    """State of another object that is compared, such as a moving average."""
    BATCH_NORM = "batch-norm"
    """Statistics of normalization layers."""
    FORWARD_COUNT = "forward-count"
    """The number of forward passes in training mode."""
    OTHER_BUFFERS = "other-buffers"
    """Buffers that are no statistics of a normalization layer: a codebook, a queue, a moving average."""
    GENERATORS = "generators"
    """Random number generators, in whichever stage replicas differ first."""


_OF_SETTINGS = frozenset(
    {
        Sign.SETTING,
        Sign.METRIC,
        Sign.SCHEDULE_POSITION,
        Sign.SCHEDULER,
        Sign.LOSS_SCALE,
        Sign.SCALER_COUNT,
        Sign.SCALER_SETTING,
    }
)
"""Signs of settings: of parameter groups, schedulers and scalers."""
_OF_KEPT_STATE = frozenset({Sign.STATE, Sign.STEP_COUNT, Sign.OUTSIDE_PARAMETERS, Sign.OTHER_OBJECT})
"""Signs of what an optimizer, or another object, computes from gradients or weights."""


def settings_differ(signs: Mapping[str, Sequence[str]], first: str | None) -> bool:
    """Return True if a setting of a parameter group differs first, or only settings of schedulers and scalers differ.

    Args:
        signs: The signs of the difference.
        first: The first entry that differs.
    """
    if FIRST["optimizer"] not in signs or Sign.ONE_SIDED in signs:
        return False
    return first in signs.get(Sign.SETTING, ()) or bool(
        _OF_SETTINGS & signs.keys() and not _OF_KEPT_STATE & signs.keys()
    )


FIRST = {stage: f"first-in-{stage}" for stage in STAGES}
"""Stage to the sign that it is the first that differs."""
SAME = {stage: f"same-{stage}" for stage in STAGES}
"""Stage to the sign that it was compared and is the same."""

_SETTING = re.compile(r"(?:.+\.)?group\d+\.(?!params\.)\w+(\..+)?")
_OUTSIDE = re.compile(r"(?:.+\.)?group\d+\.params\.\d+")
_SCALER = re.compile(r"GradScaler\.(\w+)(?:#\d+)?")
_OF_SCHEDULER = {
    **dict.fromkeys(("best", "num_bad_epochs", "cooldown_counter"), Sign.METRIC),
    **dict.fromkeys(("last_epoch", "_step_count"), Sign.SCHEDULE_POSITION),
    **dict.fromkeys(("_last_lr", "base_lrs", "_is_initial", "_get_lr_called_within_step"), Sign.SCHEDULER),
}
_OF_SCALER = {"scale": Sign.LOSS_SCALE, "_growth_tracker": Sign.SCALER_COUNT}
_OF_NORM = {
    "running_mean": Sign.BATCH_NORM,
    "running_var": Sign.BATCH_NORM,
    "num_batches_tracked": Sign.FORWARD_COUNT,
}
_FROZEN_SUFFIX = " (requires_grad=False)"


def observe_signs(step: int, rows: Rows, stage: str | None, differing: Sequence[str]) -> dict[str, list[str]]:
    """Return the signs of a difference.

    Args:
        step: The step; 0 is the build.
        rows: The stages that each replica compared.
        stage: The first stage that differs. None if replicas are at different steps.
        differing: The entries of that stage that differ or that some replica lacks.

    Returns:
        Sign to the entries that show it, in causal order; no entries where none need to be named.
    """
    signs: dict[str, list[str]] = {Sign.BUILD if step == 0 else Sign.LATER: []}
    if stage is None:
        return signs
    signs[FIRST[stage]] = []
    for other in STAGES:
        compared = [row[other] for row in rows if other in row]
        if len(compared) == len(rows) and any(each.names for each in compared):
            if len({each.digest for each in compared}) == 1:
                signs[SAME[other]] = []
            elif other == "rng":
                generators = [each.entries() for each in compared]
                signs[Sign.GENERATORS] = [
                    name for name in generators[0] if len({row.get(name) for row in generators}) > 1
                ]
    parameters = {name for row in rows if "weights" in row for name in row["weights"].names}
    kept = {_of_optimizer(name, parameters) for row in rows if "optimizer" in row for name in row["optimizer"].names}
    for kind, sign in ((Sign.STATE, Sign.KEEPS_STATE), (Sign.STEP_COUNT, Sign.COUNTS_STEPS)):
        if kind in kept:
            signs[sign] = []
    held = [row[stage].entries() if stage in row else {} for row in rows]
    seen: dict[str, dict[str, None]] = {}
    for name in differing:
        for sign in _signs_of_entry(stage, name, [row.get(name) for row in held], parameters):
            outside = _OUTSIDE.match(name) if sign is Sign.OUTSIDE_PARAMETERS else None
            seen.setdefault(sign, {})[outside[0] if outside else name] = None
    signs |= {sign: list(names) for sign, names in seen.items()}
    everything = list(dict.fromkeys(name for row in held for name in row))
    if stage == "optimizer":
        everything = [name for name in everything if _of_optimizer(name, parameters) in (Sign.STATE, Sign.STEP_COUNT)]
    share = len(set(everything) & set(differing))
    signs[Sign.MOST_ENTRIES if 4 * share >= 3 * len(everything) else Sign.FEW_ENTRIES] = []
    return signs


def _signs_of_entry(stage: str, name: str, digests: Sequence[bytes | None], parameters: set[str]) -> list[Sign]:
    """Return the signs that an entry gives, with its digest on each replica (None where it is missing)."""
    signs = []
    if None in digests:
        frozen = stage == "gradients" and name.endswith(_FROZEN_SUFFIX)
        signs.append(Sign.FROZEN if frozen else Sign.ONE_SIDED)
    elif stage == "gradients" and ABSENT in digests:
        signs.append(Sign.NO_GRADIENT)
    if stage == "buffers":
        signs.append(_OF_NORM.get(name.rpartition(".")[2], Sign.OTHER_BUFFERS))
    elif stage == "optimizer":
        signs.append(_of_optimizer(name, parameters))
    return signs


def _of_optimizer(name: str, parameters: set[str]) -> Sign:
    """Return what an entry of the stage `optimizer` is."""
    if _SETTING.fullmatch(name):
        return Sign.SETTING
    if _OUTSIDE.match(name):
        return Sign.OUTSIDE_PARAMETERS
    scaler = _SCALER.fullmatch(name)
    if scaler:
        return _OF_SCALER.get(scaler[1], Sign.SCALER_SETTING)
    if _owner(name, parameters) is not None:
        return Sign.STEP_COUNT if name.endswith(".step") else Sign.STATE
    key = name.partition(".")[2].partition(".")[0].partition("#")[0]
    return _OF_SCHEDULER.get(key, Sign.OTHER_OBJECT if parameters else Sign.STATE)


def _owner(name: str, parameters: set[str]) -> str | None:
    """Return the parameter that the optimizer keeps an entry for; the entry may begin with the optimizer's name."""
    for path in (name, name.partition(".")[2]):
        while path:
            if path in parameters:
                return path
            path = path.rpartition(".")[0]
    return None
