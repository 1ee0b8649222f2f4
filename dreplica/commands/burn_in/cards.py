"""Cards, what was checked on each, and what that says of it: the account that a burn-in keeps."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.liveness import Lost
from dreplica.environment.hardware import ask_nvidia_smi

HARDWARE = ("transient-fault", "persistent-fault")
"""Causes for which a card, or its host's memory, answers."""
OPEN = ("unexplained", "evaluation-differs", "batch-differs", "indices-differ")
"""Causes behind which there may be a card, or a file, or code. All the others are the software's,"""
VARYING = ("nondeterministic-operator", "structure-differs")
"""but for these where no more than half of the replicas do not come to the same twice: strict mode runs operators that
do, so that code would show on the others, too, and a card that fails often looks no different."""

Kind = Literal["hardware", "open", "software"]

_HEALTH = {
    "index": "nvidia_smi_index",
    "serial": "serial",
    "pci.bus_id": "pci_bus_id",
    "temperature.gpu": "temperature",
    "ecc.errors.corrected.volatile.total": "ecc_corrected",
    "ecc.errors.uncorrected.volatile.total": "ecc_uncorrected",
}
"""What nvidia-smi is asked for, by its names, and what the record calls it."""


def kind_of(verdict: Verdict, num_replicas: int) -> Kind:
    """What a verdict is laid to."""
    if verdict.cause in HARDWARE:
        return "hardware"
    on_few = 0 < 2 * len(verdict.suspects) <= num_replicas
    return "open" if verdict.cause in OPEN or (verdict.cause in VARYING and on_few) else "software"


@dataclass
class Card:
    """What one replica ran on, and what has been found there so far."""

    replica: int
    host: str
    device: str
    """`cuda:3`, as torch counts, or `cpu`."""
    name: str
    """The model, of GPU or CPU."""
    uuid: str | None
    """The GPU's."""
    driver: str | None
    health: list[dict[str, Any]] = field(default_factory=list)
    """What nvidia-smi said at the beginning and at the end; empty without it."""
    passes: int = 0
    """In which it took part."""
    steps: int = 0
    """That were compared with the other replicas."""
    comparisons: int = 0
    """Stages compared, over all steps and evaluations."""
    bytes_hashed: int = 0
    suspected: Counter[str] = field(default_factory=Counter)
    """Verdicts that name this replica, by cause."""
    unnamed: Counter[str] = field(default_factory=Counter)
    """Verdicts that name none, by cause: each replica took part."""
    named: int = 0
    """Hardware verdicts that name this card."""
    in_doubt: int = 0
    """Verdicts that leave open whether it was this card: without a majority, or without a cause that says."""
    lost: str | None = None
    """How it was lost, if it was."""

    @classmethod
    def of(cls, replica: int, manifest: Mapping[str, Any]) -> "Card":
        """As the manifest of its replica describes it."""
        device = manifest["device"]
        if device["type"] != "cuda":
            return cls(replica, manifest["host"], device["type"], manifest["cpu"]["model"], None, None)
        place = f"cuda:{device['index']}"
        return cls(replica, manifest["host"], place, device["name"], device["uuid"], device["driver"])

    @property
    def place(self) -> tuple[str, str]:
        """Tells physical cards apart: replicas may share one."""
        return self.host, self.uuid or self.device

    @property
    def state(self) -> Literal["suspect", "lost", "in doubt", "not checked", "clean"]:
        """In a word or two. What software answers for is not held against a card."""
        if self.named:
            return "suspect"
        if self.lost is not None:
            return "lost"
        if self.in_doubt:
            return "in doubt"
        return "clean" if self.comparisons else "not checked"

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "state": self.state}


@dataclass(frozen=True)
class PassDone:
    """What came of one pass: a line of burn_in.jsonl."""

    number: int
    """From 1."""
    seed: Mapping[str, int]
    """The keys of `seed` that it ran with."""
    complete: bool
    """Whether it was trained to its end."""
    steps: int
    comparisons: int
    bytes_hashed: int
    """By each replica."""
    seconds: float
    weights: str | None
    """Digest of the weights at its end, 32 hex digits: the same wherever the same pass is run on sound cards of one
    kind. None where replicas did not agree."""
    verdict: Verdict
    warnings: Sequence[str] = ()
    """Its report's."""
    folder: str | None = None
    """Where its report is kept, if it is."""

    @property
    def found(self) -> bool:
        """Whether anything was wrong with what replicas came to. That one is gone is told of by itself."""
        return self.verdict.cause not in {"none", "replica-lost"}

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
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
    """All that has been found so far: the same on every replica, since any may have to tell it.

    Attributes:
        cards: one per replica.
        passes: of which there were any, and of these `complete`: trained to their end.
        causes: of passes in which something was wrong, how many by cause,
        laid_to: and what each cause is laid to: `open` if one of its verdicts is.
        undecided: the groups that hardware verdicts which name none left against each other, with how often.
        first: of each cause, the first pass that ended in it.
        found: the first `kept` passes in which something was wrong.
        warnings: that passes gave, the first `kept` of them, with how often.
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
        """Enters a pass."""
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
        """Enters replicas that are gone."""
        for item in lost:
            self.cards[item.replica_id].lost = item.reason

    @property
    def num_found(self) -> int:
        """Passes in which something was wrong."""
        return self.causes.total()

    @property
    def suspects(self) -> list[int]:
        """Replicas whose cards hardware verdicts name."""
        return [card.replica for card in self.cards if card.state == "suspect"]


def ask_health(uuid: str | None) -> dict[str, Any] | None:
    """What nvidia-smi says of this process's GPU, as far as it does; None without it, or on a CPU."""
    if uuid is None:
        return None
    rows = ask_nvidia_smi(("uuid", *_HEALTH))
    own = [] if isinstance(rows, str) else [row for row in rows if row["uuid"].removeprefix("GPU-") == uuid]
    return {key: _number(own[0][name]) for name, key in _HEALTH.items()} if own else None


def _number(text: str) -> int | str | None:
    if text.startswith("["):  # `[N/A]`
        return None
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text
