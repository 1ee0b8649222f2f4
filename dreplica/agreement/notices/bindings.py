"""Warnings about optimizers, schedulers and memory, where the loop of a user may have a reason for less."""

from collections import Counter
from collections.abc import Iterator

from dreplica.agreement.notices.warning_texts import warning
from dreplica.agreement.subject import Subject
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.wiring.fault import WiringError
from dreplica.agreement.wiring.optimizer import held_parameters, orphaned
from dreplica.agreement.wiring.parameters import optimized_parameters
from dreplica.agreement.wiring.schedulers import scheduler_faults
from dreplica.agreement.wiring.storage import storage_faults


def warn_of_bindings(subject: Subject) -> Iterator[Evidence]:
    """Yield a warning for each part that certainly does not belong to the others.

    An optimizer may hold the parameters of a loss, and a part of the model may be trained by an optimizer that is not
    compared. So foreign parameters count only in place of parameters of the model that no optimizer holds.
    """
    for fault in _faults(subject):
        remedies = fault.remedies
        yield warning(fault.code, problem=str(fault), fix=str(remedies[0]), tensor=fault.tensor)


def _faults(subject: Subject) -> Iterator[WiringError]:
    own = list(optimized_parameters(subject.model).values())
    own_ids = set(map(id, own))
    held = {name: held_parameters(optimizer) for name, optimizer in subject.optimizers.items()}
    all_held = {id(parameter) for row in held.values() for parameter in row}
    lacking = Counter(tuple(each.shape) for each in own if each.requires_grad and id(each) not in all_held)
    for name, optimizer in subject.optimizers.items():
        orphans = [parameter for parameter in held[name] if id(parameter) not in own_ids]
        in_place = Counter(tuple(each.shape) for each in orphans) & lacking
        if lacking and orphans and (in_place or len(orphans) == len(held[name])):
            yield orphaned(own, held[name], orphans, type(optimizer).__name__)
    if subject.optimizers:
        for other in subject.others:
            if callable(getattr(other, "step", None)):
                yield from scheduler_faults(subject.optimizers.values(), other)
    trained = {name for name, each in optimized_parameters(subject.model).items() if each.requires_grad}
    for fault in storage_faults(subject.model):
        if {fault.tensor, fault.fields["other"]} & trained:
            yield fault
