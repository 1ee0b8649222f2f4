"""The remedies that follow from what a comparison and a diagnosis show.

One table lists each remedy with what must have been observed for it, and what excludes it: signs of the comparison, and
codes of evidence. Where several remain, the evidence cannot tell between them, and the likelier is listed first.
"""

from dataclasses import dataclass
from typing import Any

from dreplica.agreement.verdict.names import list_names
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.signs import FIRST, SAME, Sign
from dreplica.agreement.verdict.verdict import Verdict

_MOST = 4
"""Remedies that are listed."""
_OPEN = ("unexplained", "generators-differ", "hyperparameter-differs", "structure-differs")
"""Causes that leave open why the entries differ."""
_ONCE = ("unreplayed-state",)


@dataclass(frozen=True)
class Advice:
    """A remedy and its preconditions."""

    remedy: str
    """Code of the remedy."""
    needs: frozenset[str]
    """Signs and codes of evidence that must all be there."""
    excludes: frozenset[str] = frozenset()
    """Signs and codes of evidence of which none may be there."""
    about: str | None = None
    """The sign whose entries the remedy names, or the evidence whose data it takes."""
    causes: tuple[str, ...] = _OPEN
    """Causes that the remedy is for."""


def _advice(remedy: str, *needs: str, but_not: tuple[str, ...] = (), about: str | None = None, **more: Any) -> Advice:
    return Advice(remedy, frozenset(needs), frozenset(but_not), about, **more)


_SCHEDULES = (Sign.METRIC, Sign.SCHEDULE_POSITION)
_SCALES = (Sign.LOSS_SCALE, Sign.SCALER_COUNT)
_BY_CAUSE = ("indices-differ", "batch-differs", "evaluation-differs")

_OF_BATCH: dict[str, Any] = {"causes": ("batch-differs",)}
_LOADED_DIFFERENTLY = ("batch-varies", "batch-never-reproduced")
"""Loading the same samples again gives other ones."""
_HELD_DIFFER = ("data-split-differs", "data-names-moved", "data-rows-moved", "data-differ", "data-generators")

ADVICE = (
    # Generators that nothing has seeded.
    _advice("seed-generators", "generators-unseeded", about="generators-unseeded", causes=(*_OPEN, *_BY_CAUSE)),
    # Modules that were left in another mode.
    _advice("set-modes-alike", "equal-modes-agree", about="equal-modes-agree", causes=("structure-differs",)),
    # A difference that happened once, and is not known to be a few bits.
    *(
        _advice(remedy, code, causes=("unexplained",))
        for code in ("original-spread", "original-tensor-gone")
        for remedy in ("look-for-code-once", "rerun-from-agreement", "watch-hardware")
    ),
    _advice("compare-every-step", "original-began-unknown", causes=("unexplained",)),
    # The build.
    _advice("ddp-broadcast-build", Sign.BUILD, Sign.DDP, but_not=(Sign.WRAPPED, Sign.ONE_SIDED, FIRST["rng"])),
    _advice("ddp-write-alike", Sign.BUILD, Sign.DDP, Sign.WRAPPED, FIRST["weights"], but_not=(Sign.ONE_SIDED,)),
    _advice(
        "seed-before-build", Sign.BUILD, Sign.LIBRARY, but_not=(Sign.ONE_SIDED, Sign.WRAPPED, "generators-unseeded")
    ),
    _advice(
        "build-without-rank", Sign.BUILD, Sign.LIBRARY, but_not=(Sign.ONE_SIDED, Sign.WRAPPED, "generators-unseeded")
    ),
    # Learning rates and other settings, schedulers, scalers.
    _advice("reduce-metric", FIRST["optimizer"], Sign.METRIC, Sign.DDP),
    _advice("evaluate-metric-alike", FIRST["optimizer"], Sign.METRIC, but_not=(Sign.DDP,)),
    _advice(
        "step-scheduler-alike",
        FIRST["optimizer"],
        Sign.SCHEDULE_POSITION,
        but_not=(Sign.METRIC,),
        about=Sign.SCHEDULE_POSITION,
    ),
    _advice("set-value-alike", FIRST["optimizer"], Sign.SETTING, but_not=_SCHEDULES, about=Sign.SETTING),
    _advice(
        "set-value-alike",
        FIRST["optimizer"],
        Sign.SCHEDULER,
        but_not=(*_SCHEDULES, Sign.SETTING),
        about=Sign.SCHEDULER,
    ),
    _advice("set-value-alike", FIRST["optimizer"], Sign.SCALER_SETTING, about=Sign.SCALER_SETTING),
    # A rank that finds an inf reduces its scale and begins its count anew. One that leaves out an update keeps both.
    _advice("unscale-after-all-reduce", FIRST["optimizer"], Sign.LOSS_SCALE, Sign.SCALER_COUNT, Sign.DDP),
    _advice("update-scaler-alike", FIRST["optimizer"], Sign.SCALER_COUNT, but_not=(Sign.LOSS_SCALE,)),
    _advice(
        "set-value-alike", FIRST["optimizer"], Sign.LOSS_SCALE, but_not=(Sign.SCALER_COUNT,), about=Sign.LOSS_SCALE
    ),
    # Parameters that the model does not have.
    _advice("ddp-wrap-loss", FIRST["optimizer"], Sign.DDP, "parameters-outside", about="parameters-outside"),
    _advice(
        "seed-outside-parameters",
        FIRST["optimizer"],
        "parameters-outside",
        but_not=(Sign.DDP,),
        about="parameters-outside",
    ),
    # Gradients of data-parallel ranks.
    _advice("ddp-freeze-alike", FIRST["gradients"], Sign.DDP, Sign.FROZEN, about=Sign.FROZEN),
    _advice("ddp-find-unused", FIRST["gradients"], Sign.DDP, Sign.NO_GRADIENT, about=Sign.NO_GRADIENT),
    _advice(
        "ddp-sync-last-backward", FIRST["gradients"], Sign.DDP, Sign.WRAPPED, Sign.MOST_ENTRIES, but_not=(Sign.FROZEN,)
    ),
    _advice(
        "ddp-call-wrapped-model", FIRST["gradients"], Sign.DDP, Sign.WRAPPED, Sign.MOST_ENTRIES, but_not=(Sign.FROZEN,)
    ),
    _advice("ddp-average-all-gradients", FIRST["gradients"], Sign.DDP, but_not=(Sign.WRAPPED, Sign.FROZEN)),
    _advice(
        "ddp-freeze-before-wrapping",
        FIRST["gradients"],
        Sign.DDP,
        Sign.WRAPPED,
        Sign.FEW_ENTRIES,
        but_not=(Sign.FROZEN,),
    ),
    _advice("ddp-change-gradients-alike", FIRST["gradients"], Sign.DDP, but_not=(Sign.FROZEN, Sign.NO_GRADIENT)),
    # State that the optimizer keeps. A step that is left out shows in all of it, except where gradients are 0.
    _advice("step-optimizer-alike", FIRST["optimizer"], Sign.DDP, Sign.STEP_COUNT, but_not=(*_SCALES, Sign.SETTING)),
    *(
        _advice(
            remedy,
            FIRST["optimizer"],
            Sign.DDP,
            Sign.STATE,
            *more,
            but_not=(*_SCALES, Sign.SETTING, *not_more),
            about=about,
        )
        for remedy, more, not_more, about in (
            ("step-optimizer-alike", (Sign.MOST_ENTRIES,), (Sign.COUNTS_STEPS,), None),
            ("load-optimizer-alike", (), (), Sign.STATE),
            ("step-optimizer-alike", (), (Sign.COUNTS_STEPS,), None),
        )
    ),
    _advice(
        "ddp-change-gradients-alike", FIRST["optimizer"], Sign.DDP, Sign.STATE, but_not=(SAME["gradients"], *_SCALES)
    ),
    # Weights of data-parallel ranks with the same optimizer: a step that is left out would show in its state.
    _advice(
        "step-optimizer-alike", FIRST["weights"], Sign.LATER, Sign.DDP, Sign.MOST_ENTRIES, but_not=(Sign.KEEPS_STATE,)
    ),
    _advice("ddp-write-alike", FIRST["weights"], Sign.LATER, Sign.DDP),
    _advice("step-optimizer-alike", FIRST["weights"], Sign.LATER, Sign.DDP, but_not=(Sign.KEEPS_STATE,)),
    _advice("ddp-average-all-gradients", FIRST["weights"], Sign.LATER, Sign.DDP, but_not=(SAME["gradients"],)),
    # Buffers of data-parallel ranks.
    _advice(
        "ddp-update-from-all-ranks",
        FIRST["buffers"],
        Sign.LATER,
        Sign.DDP,
        Sign.OTHER_BUFFERS,
        about=Sign.OTHER_BUFFERS,
    ),
    _advice("ddp-broadcast-buffers", FIRST["buffers"], Sign.LATER, Sign.DDP),
    _advice("ddp-sync-batch-norm", FIRST["buffers"], Sign.LATER, Sign.DDP, Sign.BATCH_NORM),
    _advice("forward-alike", FIRST["buffers"], Sign.LATER, Sign.DDP, Sign.FORWARD_COUNT, about=Sign.FORWARD_COUNT),
    _advice("ddp-exclude-buffers", FIRST["buffers"], Sign.LATER, Sign.DDP),
    # What each data-parallel rank has for itself.
    *(
        _advice("ddp-exclude-stage", FIRST[stage], Sign.DDP, causes=(*_OPEN, *_BY_CAUSE))
        for stage in ("indices", "batch", "output", "rng", "predictions")
    ),
    _advice("draw-alike", FIRST["rng"], Sign.LATER, Sign.LIBRARY, but_not=("generators-unseeded",)),
    # Samples, where the data sets could be compared.
    _advice("seed-split", "data-split-differs", **_OF_BATCH),
    _advice("number-in-order", "data-names-moved", about="data-names-moved", **_OF_BATCH),
    *(
        _advice(remedy, "data-rows-moved", about="data-rows-moved", but_not=("data-names-moved",), **_OF_BATCH)
        for remedy in ("seed-data", "number-in-order")
    ),
    _advice("compare-data-files", "data-differ", "data-few-samples", **_OF_BATCH),
    _advice(
        "seed-data", "data-differ", about="data-differ", but_not=("data-split-differs", "data-few-samples"), **_OF_BATCH
    ),
    _advice("stable-hash", "data-differ", "hashes-differ", but_not=("data-few-samples",), **_OF_BATCH),
    _advice("compare-data-files", "data-differ", but_not=("data-split-differs",), **_OF_BATCH),
    _advice("seed-workers", "samples-random-in-workers", **_OF_BATCH),
    *(
        _advice("seed-sample-generator", "data-generators", varies, about="data-generators", **_OF_BATCH)
        for varies in _LOADED_DIFFERENTLY
    ),
    *(_advice("sample-from-index", varies, but_not=_HELD_DIFFER, **_OF_BATCH) for varies in _LOADED_DIFFERENTLY),
    _advice("stable-hash", "data-same", "samples-differ", "hashes-differ", **_OF_BATCH),
    _advice("compare-data-files", "data-from-files", "samples-differ", but_not=("data-split-differs",), **_OF_BATCH),
    _advice("sample-from-index", "data-same", "samples-differ", **_OF_BATCH),
    # Dropout in a model that is compiled on some replicas only.
    *(
        _advice(remedy, "compiled-draws-differ", causes=("declared-override",))
        for remedy in ("fallback-random", "remove-override")
    ),
    # In custom loops, before a diagnosis.
    *(
        _advice("diagnose-step", FIRST[stage], Sign.LATER, Sign.LIBRARY, but_not=(Sign.DDP, Sign.ONE_SIDED))
        for stage in ("buffers", "output", "gradients", "weights")
    ),
    _advice(
        "diagnose-step",
        FIRST["optimizer"],
        Sign.LATER,
        Sign.LIBRARY,
        Sign.STATE,
        but_not=(Sign.DDP, Sign.ONE_SIDED, Sign.SETTING, *_SCHEDULES),
    ),
    _advice(
        "set-value-alike", FIRST["optimizer"], Sign.OTHER_OBJECT, but_not=(Sign.ONE_SIDED,), about=Sign.OTHER_OBJECT
    ),
    # Code that ran once, by the trace that it has left.
    *(
        _advice(remedy, evidence, about=evidence, causes=_ONCE)
        for remedy, evidence in (
            ("find-skipped-step", "original-step-skipped"),
            ("find-forward", "original-step-counted"),
            ("find-write", "original-step-wrote"),
            ("find-attribute", "original-step-attributes"),
            ("find-branch", "original-step-graph"),
            ("find-overwritten-weights", "original-step-overwrote"),
            ("keep-counters-in-state", "original-differs"),
        )
    ),
)
"""All advice, the likelier first."""


def advise(verdict: Verdict) -> list[Remedy]:
    """Return the remedies for which a verdict has all evidence, and against which it has none."""
    evidence = {line.code: line.data for line in verdict.evidence}
    observed = verdict.signs.keys() | evidence.keys()
    remedies: dict[str, Remedy] = {}
    for advice in ADVICE:
        if verdict.cause in advice.causes and advice.needs <= observed and not advice.excludes & observed:
            data: dict[str, Any] = {}
            if advice.about in evidence:
                data = dict(evidence[advice.about])
            elif advice.about is not None:
                names = verdict.signs[advice.about]
                data = {"names": names, "some": list_names(names)}
            remedies.setdefault(advice.remedy, Remedy.of(advice.remedy, **data))
    return list(remedies.values())[:_MOST]
