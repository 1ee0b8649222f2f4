"""The verdict on a comparison that found a difference, with what the ranks have in memory of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from dreplica.agreement.exchange import Compared, Exchange, OwnEntries
from dreplica.agreement.generators import GeneratorUse
from dreplica.agreement.hasher import Hasher
from dreplica.agreement.owners import name_owners
from dreplica.agreement.reference import ReferenceDifference
from dreplica.agreement.subject import Subject
from dreplica.agreement.values import read_forms, read_unchanged, read_values
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.channel import Channel
from dreplica.distributed.rank_names import name_ranks
from dreplica.state.stages import Entry


def describe_compared(
    compared: Compared,
    read_entries: Callable[[], Mapping[str, Iterable[Entry]]],
    exchange: Exchange,
    subject: Subject,
    generators: GeneratorUse,
    hasher: Hasher,
    channel: Channel,
) -> tuple[Verdict, ReferenceDifference | None]:
    """Return the verdict on a difference, the same on all ranks.

    Note:
        Collective: call it on every rank.

    Args:
        compared: The comparison.
        read_entries: Returns the present entries of the stages.
        exchange: The messages between replicas.
        subject: The models and optimizers that are compared.
        generators: Which global generators are compared.
        hasher: What computes the fingerprints.
        channel: The control channel between all ranks.

    Returns:
        The verdict, and the difference from the reference if it is one.
    """

    def read(stage: str, names: Sequence[str]) -> OwnEntries:
        entries = read_entries()
        if stage not in compared.stages or stage not in entries:
            return OwnEntries()
        own = list(entries[stage])
        values = read_values(hasher, compared.stages[stage], own, names)
        states = generators.states if stage == "rng" else {}
        unchanged = read_unchanged(hasher, compared.stages[stage], own, states)
        return OwnEntries(values, read_forms(own, names), {name: states[name] for name in unchanged})

    owners = partial(name_owners, subject.model, subject.optimizers)
    verdict, difference = exchange.describe(compared, read, owners)
    ranks = channel.ranks_of_job
    if ranks != list(range(len(ranks))):
        line = Evidence.of("group-ranks", ranks=ranks, some=name_ranks(ranks))
        verdict = verdict.with_(evidence=[*verdict.evidence, line])
    return verdict, difference
