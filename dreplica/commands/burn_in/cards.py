"""The account of a burn-in: devices, what was checked on each, and what the verdicts say about it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.liveness.lost import Lost
from dreplica.environment.hardware import ask_nvidia_smi

HARDWARE = ("transient-fault", "persistent-fault")
"""Causes that accuse a device, or its host's memory."""
OPEN = ("unexplained", "unreplayed-state", "evaluation-differs", "batch-differs", "indices-differ")
"""Causes that may come from a device, a file or code. All other causes are attributed to software."""
VARYING = ("nondeterministic-operator", "structure-differs")
"""Causes that are open, not software, if at most half of the replicas are suspects.

In strict mode, nondeterministic code varies on all replicas. A device that fails often looks the same, but alone.
"""

Kind = Literal["hardware", "open", "software"]

_HEALTH = {
    "index": "nvidia_smi_index",
    "serial": "serial",
    "pci.bus_id": "pci_bus_id",
    "temperature.gpu": "temperature",
    "ecc.errors.corrected.volatile.total": "ecc_corrected",
    "ecc.errors.uncorrected.volatile.total": "ecc_uncorrected",
}
"""Fields queried from nvidia-smi, by its name for each, and their names in the record."""


def kind_of(verdict: Verdict, num_replicas: int) -> Kind:
    """Return what a verdict is attributed to."""
    if verdict.cause in HARDWARE:
        return "hardware"
    on_few = 0 < 2 * len(verdict.suspects) <= num_replicas
    return "open" if verdict.cause in OPEN or (verdict.cause in VARYING and on_few) else "software"


@dataclass
class Card:
    """The device of one replica, and what has been found on it so far."""

    replica: int
    host: str
    device: str
    """Device in torch's numbering, such as `cuda:3`, or `cpu`."""
    name: str
    """Model of the GPU or the CPU."""
    uuid: str | None
    """UUID of the GPU, None for a CPU."""
    driver: str | None
    health: list[dict[str, Any]] = field(default_factory=list)
    """Values from nvidia-smi at the beginning and at the end. Empty without nvidia-smi."""
    passes: int = 0
    """Number of passes in which the replica took part."""
    steps: int = 0
    """Number of steps compared with the other replicas."""
    comparisons: int = 0
    """Number of stages compared, over all steps and evaluations."""
    bytes_hashed: int = 0
    suspected: Counter[str] = field(default_factory=Counter)
    """Number of verdicts that suspect this replica, by cause."""
    unnamed: Counter[str] = field(default_factory=Counter)
    """Number of verdicts that suspect no replica, by cause."""
    named: int = 0
    """Number of hardware verdicts that suspect this device."""
    in_doubt: int = 0
    """Number of verdicts that leave this device in doubt: without a majority, or with an open cause."""
    lost: str | None = None
    """How the replica was lost, None if it was not."""

    @classmethod
    def of(cls, replica: int, manifest: Mapping[str, Any]) -> "Card":
        """Return the device that the manifest of its replica describes."""
        device = manifest["device"]
        if device["type"] != "cuda":
            return cls(replica, manifest["host"], device["type"], manifest["cpu"]["model"], None, None)
        place = f"cuda:{device['index']}"
        return cls(replica, manifest["host"], place, device["name"], device["uuid"], device["driver"])

    @property
    def place(self) -> tuple[str, str]:
        """Identity of the physical device, which replicas may share."""
        return self.host, self.uuid or self.device

    @property
    def state(self) -> Literal["suspect", "lost", "in doubt", "not checked", "clean"]:
        """State in a word or two. Software causes do not count against a device."""
        if self.named:
            return "suspect"
        if self.lost is not None:
            return "lost"
        if self.in_doubt:
            return "in doubt"
        return "clean" if self.comparisons else "not checked"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        return {**vars(self), "state": self.state}


@dataclass(frozen=True)
class PassDone:
    """The result of one pass: a line of burn_in.jsonl."""

    number: int
    """Number of the pass, from 1."""
    seed: Mapping[str, int]
    """The section `seed` of the pass."""
    complete: bool
    """True if the pass was trained to its end."""
    steps: int
    comparisons: int
    bytes_hashed: int
    """Bytes of tensors hashed by each replica."""
    seconds: float
    weights: str | None
    """Digest of the final weights, 32 hex digits. The same pass gives the same digest on all sound devices of
    one model. None if replicas diverged."""
    verdict: Verdict
    warnings: Sequence[str] = ()
    """Warnings of the report."""
    folder: str | None = None
    """The run folder, None if it was removed."""

    @property
    def found(self) -> bool:
        """True if the pass found a problem other than a lost replica, which is reported separately."""
        return self.verdict.cause not in {"none", "replica-lost"}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        return {
            "pass": self.number,
            "seed": dict(self.seed),
            "complete": self.complete,
            "steps": self.steps,
            "comparisons": self.comparisons,
            "bytes_hashed": self.bytes_hashed,
            "seconds": round(self.seconds, 3),
            "weights": self.weights,
            "cause": self.verdict.cause,
            "suspects": list(self.verdict.suspects),
            "verdict": None if self.verdict.cause == "none" else self.verdict.as_dict(),
            "warnings": list(self.warnings),
            "folder": self.folder,
        }


class Account:
    """Everything found so far. It is the same on every replica, since any of them may have to report it.

    Args:
        manifests: The manifests, one per replica.
        kept: Maximum number of findings, and of different warnings, to keep.

    Attributes:
        cards: The devices, one per replica.
        passes: Number of passes.
        complete: Number of passes trained to their end.
        causes: Number of passes with a finding, by cause.
        laid_to: What each cause is attributed to. `open` if one of its verdicts is open.
        undecided: Groups of replicas that a hardware verdict without suspects could not decide between, with counts.
        first: The first pass with each cause.
        found: The first `kept` passes with a finding.
        warnings: The first `kept` different warnings of passes, with counts.
    """

    def __init__(self, manifests: Sequence[Mapping[str, Any]], kept: int) -> None:
        self.cards = [Card.of(replica_id, manifest) for replica_id, manifest in enumerate(manifests)]
        self.passes = self.complete = 0
        self.causes: Counter[str] = Counter()
        self.laid_to: dict[str, Kind] = {}
        self.undecided: Counter[tuple[tuple[int, ...], ...]] = Counter()
        self.first: dict[str, PassDone] = {}
        self.found: list[PassDone] = []
        self.warnings: Counter[str] = Counter()
        self._kept = kept

    def add(self, done: PassDone) -> None:
        """Add a pass."""
        self.passes += 1
        self.complete += done.complete
        verdict = done.verdict
        kind = kind_of(verdict, len(self.cards))
        for card in self.cards:
            card.passes += 1
            card.steps += done.steps
            card.comparisons += done.comparisons
            card.bytes_hashed += done.bytes_hashed
            if not done.found or (verdict.suspects and card.replica not in verdict.suspects):
                continue
            (card.suspected if verdict.suspects else card.unnamed)[verdict.cause] += 1
            if kind == "hardware" and verdict.suspects:
                card.named += 1
            elif kind != "software":
                card.in_doubt += 1
        if done.found:
            self.causes[verdict.cause] += 1
            if self.laid_to.get(verdict.cause) != "open":
                self.laid_to[verdict.cause] = kind
            self.first.setdefault(verdict.cause, done)
            if len(self.found) < self._kept:
                self.found.append(done)
        for warning in done.warnings:
            if warning in self.warnings or len(self.warnings) < self._kept:
                self.warnings[warning] += 1
        if verdict.cause in HARDWARE and not verdict.suspects:
            self.undecided[tuple(tuple(ids) for ids in verdict.groups)] += 1

    def lose(self, lost: Sequence[Lost]) -> None:
        """Add replicas that were lost."""
        for item in lost:
            self.cards[item.replica_id].lost = item.reason

    @property
    def num_found(self) -> int:
        """Number of passes with a finding."""
        return self.causes.total()

    @property
    def suspects(self) -> list[int]:
        """Replicas whose devices are suspects of hardware verdicts."""
        return [card.replica for card in self.cards if card.state == "suspect"]


def ask_health(uuid: str | None) -> dict[str, Any] | None:
    """Return the values of nvidia-smi for the GPU with this UUID, or None on a CPU or without nvidia-smi."""
    if uuid is None:
        return None
    rows = ask_nvidia_smi(("uuid", *_HEALTH))
    own = [] if isinstance(rows, str) else [row for row in rows if row["uuid"].removeprefix("GPU-") == uuid]
    return {key: _number(own[0][name]) for name, key in _HEALTH.items()} if own else None


def _number(text: str) -> int | str | None:
    if text.startswith("["):  # `[N/A]`
        return None
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text
