"""A run that is compared with a recorded one while it goes (`run.reference`)."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dreplica.agreement.reference import Reference, ReferenceDifference
from dreplica.agreement.trace.run_metadata import (
    RunDifference,
    config_differences,
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
    """What the replicas of a run know of its reference. Rank 0 reads it, and tells the others.

    Creating it and its methods are collectives. Raises SharedUsageError where the reference cannot be used; its digests
    must be of this run's `algorithm`.

    Attributes:
        reference: on rank 0, if there is one.
        differences: in what this run and the reference differ, and what else is to be known of it, a line each; the
            same on all replicas.
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
    def is_there(self) -> bool:
        """Whether this run has a reference."""
        return self._config.run.reference is not None

    def compare_settings(self, folder: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
        """In what this run, recorded in `folder`, differs from the reference: told, and kept as evidence."""
        if not self.is_there:
            return
        own = self._world.together(lambda: self._differences(folder, manifests))
        self._config_rows, self._manifest_rows, self.differences = self._world.channel.gather(own)[0]
        if self._world.is_coordinator:
            for line in self.differences:
                log.warning(line)

    def known(self, difference: ReferenceDifference) -> AgainstReference:
        """What a difference from the reference is to be explained with."""
        seeds = {"seed.model": self._config.seed.model, "seed.data": self._config.seed.data}
        unseeded = frozenset(key for key, seed in seeds.items() if seed is None)
        return AgainstReference(difference, self._config_rows, self._manifest_rows, unseeded)

    def conclude(self, verdict: Verdict, steps_done: int) -> tuple[Verdict, list[str]]:
        """The verdict on a run in which nothing was found, and what the report should warn of."""
        if not self.is_there:
            return verdict, []
        reference = self.reference
        compared, only_samples, last_step = self._world.channel.gather(
            reference and (reference.num_compared, reference.only_samples, reference.trace.last_key[0])
        )[0]
        name = self._config.run.reference
        if not compared:
            line = f"nothing was compared with the reference {name}: it has recorded none of these steps"
            return verdict, [*self.differences, line]
        late = f"the reference {name} ends at step {last_step}: later steps were compared with nothing"
        same = f"the same {'samples ' * only_samples}as {name} up to step {min(last_step, steps_done)}"
        lines = self.differences + [late] * (last_step < steps_done)
        if only_samples:
            lines.append(
                f"of the reference {name} only the samples were compared: the states of independent replicas are not "
                "recorded. Compare the two runs when they have ended: dreplica compare"
            )
        return verdict.with_(summary=f"{verdict.summary}; {same}"), lines

    def _open(self) -> Reference:
        assert self._config.run.reference is not None
        if not self._config.agreement.every:
            raise UsageError(
                f"run.reference: {self._config.run.reference!r} is compared where steps are checked, and with "
                "agreement.every 0 none is. Set --agreement.every 1, or leave run.reference out."
            )
        try:
            return Reference(Path(self._config.run.reference), self._algorithm)
        except UsageError as error:
            raise UsageError(f"run.reference: {error}") from None

    def _differences(
        self, folder: Path, manifests: Sequence[Mapping[str, Any]]
    ) -> tuple[list[RunDifference], list[RunDifference], list[str]]:
        """Nothing on replicas other than rank 0's."""
        if self.reference is None:
            return [], [], []
        trace = self.reference.trace
        if trace.path.resolve().parent == folder.resolve():
            raise UsageError(
                f"run.reference: {self._config.run.reference!r} is the folder that this run goes on in, and what it "
                "comes to again is compared in any case. Leave run.reference out, or name another run."
            )
        recorded = read_run(trace.path.parent)
        own, own_rows = yaml.safe_load(self._config.to_yaml()), json.loads(json.dumps(manifests))
        config = config_differences(recorded.config, own) if recorded.config is not None else []
        manifest = manifest_differences(recorded.manifests, own_rows) if recorded.manifests is not None else []
        lines = [f"reference: {line}" for line in recorded.problems]
        if trace.is_cut_off:
            lines.append(f"reference: its last line was cut off; step {trace.last_key[0]} is the last")
        if trace.diverged_at is not None:
            lines.append(f"reference: its own replicas had diverged at step {trace.diverged_at}; it is its replica 0's")
        lines += [
            f"reference: {item.field} was {show(item.one)}, and is {show(item.other)} here"
            for item in (*config, *manifest)
            if item.matters
        ]
        return config, manifest, lines
