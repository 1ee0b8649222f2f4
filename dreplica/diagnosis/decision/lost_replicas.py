"""The verdict on replicas that ended, failed or stopped responding."""

from collections.abc import Sequence

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision.conclude import with_remedy
from dreplica.distributed.failure import describe_exception
from dreplica.distributed.liveness.lost import Lost, ReplicaLost


def replica_lost(lost: Sequence[Lost], step: int | None, noticed: BaseException) -> Verdict:
    """Return the verdict on replicas that ended, failed or stopped responding.

    Args:
        lost: The replicas that are known to be lost.
        step: The last completed step, or None before the first one.
        noticed: The exception that ended the run on the replica that reports.
    """
    evidence = [
        Evidence.of(
            "replica-lost",
            replica=item.replica_id,
            reason=item.reason,
            loss=item.code,
            step=item.step,
            stack=list(item.stack),
            silent=item.silent,
            failure=None if item.failure is None else item.failure.as_dict(),
        )
        for item in lost
    ]
    names = ", ".join(str(item.replica_id) for item in lost) or "unknown"
    when = "before the first step" if step is None else f"in step {step + 1}"
    first = f": {lost[0].reason}" if lost else ""
    verdict = Verdict(
        False,
        "replica-lost",
        f"{'replicas' if len(lost) > 1 else 'replica'} {names} {'were' if len(lost) > 1 else 'was'} lost {when}{first}",
        step=None if step is None else step + 1,
        suspects=[item.replica_id for item in lost],
        evidence=[*evidence, _noticed(noticed)],
    )
    if lost and all(item.raised for item in lost):
        remedies = [Remedy.of("fix-exception", replica=item.replica_id, error=item.failure) for item in lost]
        verdict = verdict.with_(remedy=remedies)
    return with_remedy(verdict)


def _noticed(error: BaseException) -> Evidence:
    """Return how this replica learned of the loss: from another one's silence, or as the one that failed."""
    if isinstance(error, ReplicaLost):
        return Evidence.of("loss-noticed", error=error.fields.get("noticed", str(error)))
    return Evidence.of("raised-error", error=describe_exception(error))
