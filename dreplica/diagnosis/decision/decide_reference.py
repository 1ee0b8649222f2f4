"""Findings on a difference from a recorded run, as far as one side shows them: the other run cannot be replayed.

Configs and environments of the two runs are compared. A setting is the cause only in two situations. Either it must
show in the very stage in which the runs first diverge. Or this run reproduces itself, nothing else that differs can act
on that stage, and the runs diverge as soon as the setting can act: a setting that changed nothing for many steps does
not suddenly change something. Settings that can be changed are set as in the reference, and the step is replayed once
more: if it then reproduces the reference's result, they are the cause.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dreplica.agreement.reference import ReferenceDifference
from dreplica.agreement.trace.run_metadata import RunDifference, fold_distributions, show
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.diagnosis.decision.decide import decide_alone
from dreplica.diagnosis.decision.rules import name_in
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Decision, Witness, with_findings, with_lines
from dreplica.environment.determinism import CHANGEABLE, numerics_as
from dreplica.environment.manifest import follows_from
from dreplica.environment.variables import STRICT, variable_may_round
from dreplica.state.fingerprint.stage import STAGES

_BUILT = ("weights", "buffers", "rng")
_COMPUTED = ("buffers", "output", "gradients", "optimizer", "weights")
_SHOWS_IN: dict[str, tuple[str, ...]] = {
    "seed.data": ("indices",),
    "data.batch_size": ("indices",),
    "optim": ("optimizer",),
    "schedule": ("optimizer",),
}
"""Config sections and keys to the stages in which a difference must show at the first step."""
_SHOWS_IN_BUILD = {"seed.model", "model.name", "model.weights"}
"""Config keys whose difference must show at the build."""
_SHOWS_NOWHERE = {"optim.foreach", "optim.fused", "optim.capturable", "optim.differentiable"}
"""Config keys that determine how a step is computed and that no digest contains."""
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
"""Config sections and keys to the stages in which a difference may show first."""
_CHANGEABLE = {f"numerics.{name}" for name in CHANGEABLE}
_SHOWN = {
    "indices": Kind.REFERENCE_INDICES,
    "batch": Kind.REFERENCE_BATCH,
    "predictions": Kind.REFERENCE_PREDICTIONS,
}
"""Stages that name a cause themselves."""
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
    *(f"variables.{name}" for name in STRICT),
)
"""Manifest fields, or their prefixes, that may change a stage that `_ENVIRONMENT_ACTS_ON` does not list."""


@dataclass(frozen=True)
class AgainstReference:
    """A difference from a reference, with the differences between the two runs' configs and environments."""

    difference: ReferenceDifference
    """The place where the runs diverge, with the digests that the reference recorded there."""
    config: Sequence[RunDifference]
    """Config keys that differ; `one` is the reference's value."""
    manifest: Sequence[RunDifference]
    """Manifest fields that differ; `one` is the reference's value."""
    unseeded: frozenset[str]
    """The keys among `seed.model` and `seed.data` that are null in this run."""

    def evidence(self) -> list[Evidence]:
        """Return one line for each difference between the runs that may matter."""
        named = (("config", self.config), ("manifest", fold_distributions(self.manifest)))
        return [
            Evidence.of(
                "reference-field-differs",
                kind=kind,
                field=item.field,
                there=show(item.one),
                here=show(item.other),
                values=[item.one, item.other],
            )
            for kind, items in named
            for item in items
            if item.matters
        ]

    def judge(self, witnesses: Sequence[Witness], again: Callable[[], Mapping[str, bytes]]) -> Decision:
        """Name the cause from the observations of replays.

        Note:
            Collective: call on every rank.

        Args:
            witnesses: The observations of each replica, by replica id.
            again: Replays the step once more and returns its stages' digests.

        Returns:
            The cause with its evidence.
        """
        recorded = {stage: bytes.fromhex(digest) for stage, digest in self.difference.recorded.items()}
        decision = decide_alone(witnesses, recorded)
        if decision is not None:
            return name_in(decision)
        lines = [Evidence.of("reference-reproduces")]
        tried = [item for item in self.manifest if item.field in _CHANGEABLE and not isinstance(item.one, list)]
        if not tried:
            return _begin_with(lines, self.account())
        with numerics_as({item.field.removeprefix("numerics."): item.one for item in tried}):
            stages = again()
        with_ = " and ".join(f"{item.field} {show(item.one)}" for item in tried)
        if all(stages[name] == recorded[name] for name in stages.keys() & recorded.keys()):
            lines.append(Evidence.of("reference-settings-explain", settings=with_))
            given = {_own_key(item.field) for item in self.config}
            is_set = all(given & set(follows_from(item.field)) for item in tried)
            return _named(Finding(Kind.REFERENCE_SETTING_EXPLAINS if is_set else Kind.REFERENCE_FLAG_EXPLAINS, lines))
        lines.append(Evidence.of("reference-settings-do-not-explain", settings=with_))
        excluded = {item.field for item in tried} | {key for item in tried for key in follows_from(item.field)}
        return _begin_with(lines, self.account(excluded))

    def account(self, excluded: Collection[str] = ()) -> Decision:
        """Collect the findings from configs and environments, for a run that reproduces itself, and name the cause.

        Args:
            excluded: Fields that are known not to be the cause alone.

        Returns:
            The cause with its evidence.
        """
        place = self.difference.place
        stage, is_build = place.stage, place.step == 0
        must = [item for item in self.config if self._must_show(item)]
        if must:
            line = Evidence.of("reference-setting-must-show", fields=_names(must), stage=stage)
            return _named(Finding(Kind.REFERENCE_SETTING_SHOWS, [line]))
        if stage == "indices" and "seed.data" in self.unseeded:
            return _named(Finding(Kind.REFERENCE_INDICES, [Evidence.of("reference-data-unseeded")]))
        if is_build and "seed.model" in self.unseeded:
            return _named(Finding(Kind.BUILD_UNSEEDED, [Evidence.of("reference-model-unseeded")]))
        config, manifest = (
            [item for item in items if item.matters and item.field not in excluded]
            for items in (self.config, self.manifest)
        )
        settings = [item for item in config if self._reaches(_acts_on(_own_key(item.field)))]
        environment = [item for item in manifest if self._may_act(item.field)]
        shown = [Finding(_SHOWN[stage])] if stage in _SHOWN else []
        vague = [item for item in manifest if _might_act(item.field) and stage != "indices"]
        if not settings and not environment and vague:
            line = Evidence.of("reference-may-act", stage=stage, fields=_names(fold_distributions(vague)))
            return _named(*shown, lines=[line, Evidence.of("reference-ambiguous")])
        if not settings and not environment:
            return _named(*shown, lines=[Evidence.of("reference-nothing-acts", stage=stage)])
        line = Evidence.of("reference-may-act", stage=stage, fields=_names([*settings, *environment]))
        if not self.difference.is_first:
            return _named(*shown, lines=[line, Evidence.of("reference-acted-before")])
        acting = [Finding(Kind.REFERENCE_SETTING_ACTS)] if settings else []
        acting += [Finding(Kind.REFERENCE_ENVIRONMENT_ACTS)] if environment else []
        last = "reference-ambiguous" if settings and environment else "reference-assumed-sound"
        return _named(*shown, *acting, lines=[line, Evidence.of(last)])

    def remedy(self, cause: str) -> list[Remedy]:
        """Return the settings that make this run like the reference, of those that may be the cause."""
        keys = {item.field: item for item in self.config if item.matters and not item.field.startswith("overrides.")}
        if cause != "config-differs":
            return []
        decisive = [item for item in keys.values() if self._must_show(item)]
        decisive = decisive or [item for key, item in keys.items() if self._reaches(_acts_on(key))]
        return [Remedy.of("set-as-in-reference", settings={item.field: item.one}) for item in decisive]

    def _must_show(self, item: RunDifference) -> bool:
        place, key = self.difference.place, _own_key(item.field)
        if key == "inject":
            faults = [*(item.one or []), *(item.other or [])]
            return any((fault["replica"], fault["step"]) == (0, place.step) for fault in faults)
        if place.step == 0:
            return key in _SHOWS_IN_BUILD and place.stage in _BUILT
        stages = () if key in _SHOWS_NOWHERE else _SHOWS_IN.get(key, _SHOWS_IN.get(key.partition(".")[0], ()))
        return self.difference.is_first and place.phase is None and place.stage in stages

    @property
    def _came_from_before(self) -> bool:
        """True if the difference may have been made in an earlier step, none of which was compared."""
        place = self.difference.place
        computed = place.stage not in ("indices", "batch")
        return self.difference.is_first and computed and (place.step > 1 or place.phase is not None)

    def _reaches(self, stages: Collection[str]) -> bool:
        """Return True if a difference in these stages may show in the stage where the runs first diverge."""
        return self.difference.place.stage in stages or (self._came_from_before and bool(stages))

    def _may_act(self, field: str) -> bool:
        """Return True if a manifest field may change the stage and does not merely follow from a setting."""
        if {_own_key(item.field) for item in self.config} & set(follows_from(field)):
            return False
        names = _ENVIRONMENT_ACTS_ON.get(self.difference.place.stage or "", _ENVIRONMENT_ACTS)
        if self._came_from_before:
            names = (*names, *_ENVIRONMENT_ACTS_ON["batch"])
        return any(field == name or (name.endswith(".") and field.startswith(name)) for name in names)


def _might_act(field: str) -> bool:
    """Return True if a manifest field can act on some code, without evidence that it acts on this step."""
    section, _, name = field.partition(".")
    return section in ("commit", "distributions") or (section == "variables" and variable_may_round(name))


def _named(*findings: Finding, lines: Sequence[Evidence] = ()) -> Decision:
    return name_in(with_lines(with_findings(Decision("unexplained", [], []), *findings), *lines))


def _begin_with(lines: Sequence[Evidence], decision: Decision) -> Decision:
    return replace(decision, evidence=[*lines, *decision.evidence])


def _own_key(key: str) -> str:
    """Return the key that an override for replica 0 changes: replicas agree, so other overrides change nothing."""
    return key.removeprefix("overrides.0.")


def _acts_on(key: str) -> tuple[str, ...]:
    return _ACTS_ON.get(key, _ACTS_ON.get(key.partition(".")[0], ()))


def _names(items: Sequence[RunDifference]) -> str:
    return ", ".join(f"{item.field} ({show(item.one)} there, {show(item.other)} here)" for item in items)
