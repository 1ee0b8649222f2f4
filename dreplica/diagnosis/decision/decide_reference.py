"""Why a run is not what a recorded one was, as far as one side allows: that other run cannot be replayed.

What the two were given and ran on is compared. A setting counts as the cause only where it must show in the very stage
in which the runs part first; or where this side reproduces itself, nothing else that differs can act on that stage, and
the runs part as soon as it can: what has given the same for many steps does not change by itself. What can be put as it
was in the reference, is, and the step taken once more: if it then comes to what the reference has, that was it.
"""

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dreplica.agreement.reference import ReferenceDifference
from dreplica.agreement.trace.run_metadata import RunDifference, show
from dreplica.diagnosis.decision.decide import decide_alone
from dreplica.diagnosis.evidence.observation import Decision, Witness
from dreplica.environment.determinism import CHANGEABLE, numerics_as
from dreplica.environment.manifest import follows_from
from dreplica.state.fingerprint.stage import STAGES

_BUILT = ("weights", "buffers", "rng")
_COMPUTED = ("buffers", "output", "gradients", "optimizer", "weights")
_SHOWS_IN: dict[str, tuple[str, ...]] = {
    "seed.data": ("indices",),
    "data.batch_size": ("indices",),
    "optim": ("optimizer",),
    "schedule": ("optimizer",),
}
"""Config sections and keys to the stage in which a difference must show, in the first step."""
_SHOWS_IN_BUILD = {"seed.model", "model.name", "model.weights"}
"""And those that must show in the build."""
_SHOWS_NOWHERE = {"optim.foreach", "optim.fused", "optim.capturable", "optim.differentiable"}
"""They say how a step is computed, and no digest has them."""
_ACTS_ON: dict[str, tuple[str, ...]] = {
    "seed": (),
    "data": ("indices", "batch"),
    "criterion": _COMPUTED,
    "optim": ("optimizer", "weights"),
    "schedule": ("optimizer", "weights"),
    "train.grad_clip": ("gradients", "optimizer", "weights"),
    "train.amp": _COMPUTED,
    "train.accumulate": _COMPUTED,
    "model": (*_BUILT, *_COMPUTED),
    "replica": (*_BUILT, *_COMPUTED),
    "determinism": _COMPUTED,
    "world.device": (*_BUILT, *_COMPUTED),
    "seed.augment": ("batch",),
    "inject": STAGES,
}
"""Config sections and keys to the stages in which a difference may show first, all before being equal."""
_CHANGEABLE = {f"numerics.{name}" for name in CHANGEABLE}
_ENVIRONMENT_ACTS_ON: dict[str, tuple[str, ...]] = {
    "indices": ("data", "code", "packages.torch"),
    "batch": ("data", "code", "packages.torch", "packages.torchvision", "packages.pillow", "packages.numpy", "cpu."),
}
_ENVIRONMENT_ACTS = (
    "code",
    "weights",
    "packages.torch",
    "packages.torchvision",
    "cpu.",
    "device.",
    "numerics.",
    "variables.",
)
"""Manifest fields, or how they begin, to what they may change: some stages, and all others."""


@dataclass(frozen=True)
class AgainstReference:
    """A difference from a reference, and in what the two runs differ: in all of these, the reference is `one`."""

    apart: ReferenceDifference
    config: Sequence[RunDifference]
    manifest: Sequence[RunDifference]
    unseeded: frozenset[str]
    """Which of `seed.model` and `seed.data` are null here."""

    def evidence(self) -> list[str]:
        """Every difference that may matter, a line each."""
        named = (("config", self.config), ("manifest", self.manifest))
        return [
            f"differs from the reference ({kind}): {item.field}: {show(item.one)} there, {show(item.other)} here"
            for kind, items in named
            for item in items
            if item.matters
        ]

    def judge(self, witnesses: Sequence[Witness], again: Callable[[], Mapping[str, bytes]]) -> Decision:
        """Decides on what replays of the step have shown; `again` runs it once more. A collective."""
        recorded = {stage: bytes.fromhex(digest) for stage, digest in self.apart.recorded.items()}
        decision = decide_alone(witnesses, recorded)
        if decision is not None:
            return decision
        lines = ["the replays come to what this run came to: this side reproduces itself"]
        tried = [item for item in self.manifest if item.field in _CHANGEABLE and not isinstance(item.one, list)]
        if not tried:
            return _begin_with(lines, self.account())
        with numerics_as({item.field.removeprefix("numerics."): item.one for item in tried}):
            stages = again()
        with_ = " and ".join(f"{item.field} {show(item.one)}" for item in tried)
        if all(stages[name] == recorded[name] for name in stages.keys() & recorded.keys()):
            lines.append(f"with {with_}, as in the reference, the step comes to what the reference has")
            given = {_own_key(item.field) for item in self.config}
            is_set = all(given & set(follows_from(item.field)) for item in tried)
            return Decision("config-differs" if is_set else "environment-differs", [], lines)
        lines.append(f"with {with_}, as in the reference, the step does not come to what the reference has, either")
        excluded = {item.field for item in tried} | {key for item in tried for key in follows_from(item.field)}
        return _begin_with(lines, self.account(excluded))

    def account(self, excluded: Collection[str] = ()) -> Decision:
        """What accounts for the difference, if this side reproduces what it came to.

        `excluded`: fields of which it is known that they do not, by themselves.
        """
        place = self.apart.place
        stage, is_build = place.stage, place.step == 0
        must = [item for item in self.config if self._must_show(item)]
        if must:
            line = f"a difference in {_names(must)} must show in {stage} as soon as it can"
            return Decision("config-differs", [], [line])
        if stage == "indices" and "seed.data" in self.unseeded:
            return Decision("indices-differ", [], ["seed.data is null: each run draws an order of samples of its own"])
        if is_build and "seed.model" in self.unseeded:
            return Decision("build-not-seeded", [], ["seed.model is null: each run draws a seed of its own"])
        config, manifest = (
            [item for item in items if item.matters and item.field not in excluded]
            for items in (self.config, self.manifest)
        )
        settings = [item for item in config if self._reaches(_acts_on(_own_key(item.field)))]
        environment = [item for item in manifest if self._may_act(item.field)]
        cause = {"indices": "indices-differ", "batch": "batch-differs", "predictions": "evaluation-differs"}
        unexplained = cause.get(stage or "", "unexplained")
        if not settings and not environment:
            line = f"nothing that is recorded of the two runs differs that could act on {stage}"
            return Decision(unexplained, [], [line])
        line = f"of what the two runs differ in, this can act on {stage}: {_names([*settings, *environment])}"
        if not self.apart.is_first:
            late = "but the steps compared before are the same, and it would have acted on them, too"
            return Decision(unexplained, [], [line, late])
        if settings and environment:
            return Decision(unexplained, [], [line, "which of it is the cause cannot be told from here"])
        line += "; that the reference itself was sound is taken for granted"
        return Decision("config-differs" if settings else "environment-differs", [], [line])

    def remedy(self, cause: str) -> list[str]:
        """Lines to paste, for differences in settings that can have been the cause."""
        keys = {item.field: item for item in self.config if item.matters and not item.field.startswith("overrides.")}
        if cause != "config-differs":
            return []
        decisive = [item for item in keys.values() if self._must_show(item)]
        decisive = decisive or [item for key, item in keys.items() if self._reaches(_acts_on(key))]
        return [f"--{item.field} {shlex.quote(json.dumps(item.one))}  # as in the reference" for item in decisive]

    def _must_show(self, item: RunDifference) -> bool:
        place, key = self.apart.place, _own_key(item.field)
        if key == "inject":
            faults = [*(item.one or []), *(item.other or [])]
            return any((fault["replica"], fault["step"]) == (0, place.step) for fault in faults)
        if place.step == 0:
            return key in _SHOWS_IN_BUILD and place.stage in _BUILT
        stages = () if key in _SHOWS_NOWHERE else _SHOWS_IN.get(key, _SHOWS_IN.get(key.partition(".")[0], ()))
        return self.apart.is_first and place.phase is None and place.stage in stages

    @property
    def _came_from_before(self) -> bool:
        """Whether the difference may have been made in an earlier step, none of which was compared, in any stage."""
        place = self.apart.place
        computed = place.stage not in ("indices", "batch")
        return self.apart.is_first and computed and (place.step > 1 or place.phase is not None)

    def _reaches(self, stages: Collection[str]) -> bool:
        """Whether what acts on these stages may show in the one in which the runs part first."""
        return self.apart.place.stage in stages or (self._came_from_before and bool(stages))

    def _may_act(self, field: str) -> bool:
        """Whether a manifest field, unless it just follows from a setting, may change what the stage is."""
        if {_own_key(item.field) for item in self.config} & set(follows_from(field)):
            return False
        names = _ENVIRONMENT_ACTS_ON.get(self.apart.place.stage or "", _ENVIRONMENT_ACTS)
        if self._came_from_before:
            names = (*names, *_ENVIRONMENT_ACTS_ON["batch"])
        return any(field == name or (name.endswith(".") and field.startswith(name)) for name in names)


def _begin_with(lines: Sequence[str], decision: Decision) -> Decision:
    return replace(decision, evidence=[*lines, *decision.evidence])


def _own_key(key: str) -> str:
    """The key that an override for replica 0 changes; replicas agree, so the other overrides change nothing."""
    return key.removeprefix("overrides.0.")


def _acts_on(key: str) -> tuple[str, ...]:
    return _ACTS_ON.get(key, _ACTS_ON.get(key.partition(".")[0], ()))


def _names(items: Sequence[RunDifference]) -> str:
    return ", ".join(f"{item.field} ({show(item.one)} there, {show(item.other)} here)" for item in items)
