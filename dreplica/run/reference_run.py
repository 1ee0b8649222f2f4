"""The reference run that a run in progress is compared with (`run.reference`)."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dreplica.agreement.reference import Reference, ReferenceDifference
from dreplica.agreement.trace.report_records import ReferenceCoverage
from dreplica.agreement.trace.run_metadata import (
    RunDifference,
    config_differences,
    fold_distributions,
    manifest_differences,
    read_run,
    show,
)
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import RunConfig
from dreplica.diagnosis.decision.decide_reference import AgainstReference
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError

log = logging.getLogger(__name__)


class ReferenceRun:
    """The reference run, if the config names one. Rank 0 reads it and sends what the other replicas need.

    Args:
        config: The config of this run.
        world: All replicas.
        algorithm: The fingerprint algorithm of this run. The reference must have been recorded with the same one.

    Attributes:
        reference: The recorded trace, on rank 0.
        differences: How config and environment of this run differ from the reference, and what limits the comparison.
            One line each, the same on all replicas.

    Raises:
        SharedUsageError: The reference cannot be read or compared.

    Note:
        Collective: create it, and call its methods, on every rank.
    """

    def __init__(self, config: RunConfig, world: World, algorithm: str) -> None:
        self.reference: Reference | None = None
        self.differences: list[str] = []
        self._config, self._world, self._algorithm = config, world, algorithm
        self._config_rows: list[RunDifference] = []
        self._manifest_rows: list[RunDifference] = []
        if config.run.reference is not None:
            self.reference = world.together(self._open if world.is_coordinator else lambda: None)

    @property
    def exists(self) -> bool:
        """True if this run has a reference."""
        return self._config.run.reference is not None

    def coverage(self) -> ReferenceCoverage | None:
        """Return the extent of the comparison so far, or None on ranks other than 0 and without a reference."""
        if self.reference is None:
            return None
        return ReferenceCoverage(run=str(self._config.run.reference), steps=self.reference.num_compared)

    def compare_settings(self, folder: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
        """Compare config and environment with those of the reference, log the differences and keep them as evidence.

        Args:
            folder: The run folder of this run.
            manifests: The manifests of this run, one per replica.
        """
        if not self.exists:
            return
        own = self._world.together(lambda: self._differences(folder, manifests))
        self._config_rows, self._manifest_rows, self.differences = self._world.channel.gather(own)[0]
        if self._world.is_coordinator:
            for line in self.differences:
                log.warning(line)

    def known(self, difference: ReferenceDifference) -> AgainstReference:
        """Return what is known about a difference from the reference, for its diagnosis."""
        seeds = {"seed.model": self._config.seed.model, "seed.data": self._config.seed.data}
        unseeded = frozenset(key for key, seed in seeds.items() if seed is None)
        return AgainstReference(difference, self._config_rows, self._manifest_rows, unseeded)

    def conclude(self, verdict: Verdict, steps_done: int) -> tuple[Verdict, list[str]]:
        """Return the verdict of a run without a divergence, with the coverage of the comparison, and warnings.

        Args:
            verdict: The verdict of the run itself.
            steps_done: Number of steps taken.

        Returns:
            The verdict, and the warnings for the report.
        """
        if not self.exists:
            return verdict, []
        reference = self.reference
        compared, only_samples, last_step = self._world.channel.gather(
            reference and (reference.num_compared, reference.only_samples, reference.trace.last_key[0])
        )[0]
        name = self._config.run.reference
        if not compared:
            line = f"nothing was compared with the reference {name}: it has recorded none of the steps of this run"
            return verdict, [*self.differences, line]
        late = f"the reference {name} ends at step {last_step}: later steps were not compared with it"
        same = f"the same {'samples ' * only_samples}as {name} up to step {min(last_step, steps_done)}"
        lines = self.differences + [late] * (last_step < steps_done)
        if only_samples:
            lines.append(
                f"only the samples were compared with the reference {name}: a trace does not record the states of "
                "independent replicas. Compare the two runs after they have ended, with dreplica compare."
            )
        if self._world.num_replicas == 1 and verdict.cause == "none":
            steps = min(last_step, steps_done)
            what = "the same samples" if only_samples else "bit-identical"
            return verdict.with_(agreed=True, summary=f"with {name}, {steps} steps: {what}"), lines
        return verdict.with_(summary=f"{verdict.summary}; {same}"), lines

    def _open(self) -> Reference:
        assert self._config.run.reference is not None
        if not self._config.agreement.every:
            raise UsageError(
                f"run.reference: {self._config.run.reference!r} cannot be compared with agreement.every 0, which "
                "checks no step. Set --agreement.every 1, or remove run.reference.",
                code="ignored-setting",
                key="run.reference",
            )
        try:
            return Reference(Path(self._config.run.reference), self._algorithm)
        except UsageError as error:
            raise UsageError(f"run.reference: {error}") from None

    def _differences(
        self, folder: Path, manifests: Sequence[Mapping[str, Any]]
    ) -> tuple[list[RunDifference], list[RunDifference], list[str]]:
        """Return the differences in config and manifests, and lines about them. Empty except on rank 0."""
        if self.reference is None:
            return [], [], []
        trace = self.reference.trace
        if trace.path.resolve().parent == folder.resolve():
            raise UsageError(
                f"run.reference: {self._config.run.reference!r} is the folder of the run that is resumed, whose "
                "repeated steps are always compared with its trace. Remove run.reference, or set it to another run."
            )
        recorded = read_run(trace.path.parent)
        own, own_rows = yaml.safe_load(self._config.to_yaml()), json.loads(json.dumps(manifests))
        config = config_differences(recorded.config, own) if recorded.config is not None else []
        configured = recorded.config is not None
        manifest = manifest_differences(recorded.manifests or [], own_rows, configured) if recorded.manifests else []
        lines = [f"reference: {line}" for line in recorded.problems]
        if trace.is_cut_off:
            lines.append(
                f"reference: its last line is incomplete and was ignored; its last step is {trace.last_key[0]}"
            )
        if trace.diverged_at is not None:
            lines.append(
                f"reference: its own replicas diverged at step {trace.diverged_at}; the trace is of its replica 0"
            )
        lines += [
            f"reference: {item.field} was {show(item.one)}, and is {show(item.other)} in this run"
            for item in (*config, *fold_distributions(manifest))
            if item.matters
        ]
        return config, manifest, lines
