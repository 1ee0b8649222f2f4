"""Descriptions of what did not run in a trial: an operator that raised in strict mode, or exhausted memory."""

from dataclasses import asdict
from typing import Any

import torch

from dreplica.diagnosis.decision.nondeterministic_ops import explain_operator
from dreplica.diagnosis.tracing.refused_op import find_refused, is_refusal
from dreplica.environment.determinism import numerics_flags
from dreplica.run.explain import Explainer
from dreplica.training.history import StepEntry
from dreplica.training.step import training_step

_OUT_OF_MEMORY = ("CUDA error: out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
"""Texts in errors of CUDA, of torch on the CPU and of CUDA's libraries."""


def describe_unrun(error: RuntimeError, replica_id: int) -> dict[str, Any] | None:
    """Describe an error of strict mode before the first step, or exhausted memory at any point.

    Returns:
        JSON values with phase (`build` or `memory`) and message, or None for any other error.
    """
    message = ". ".join(str(error).split(". ")[:2]).partition("\n")[0]
    if is_refusal(error):
        return {"phase": "build", "message": message.split(". ")[0]}
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return {"phase": "memory", "message": f"replica {replica_id}: {message}"}
    return None


def describe_refusal(error: RuntimeError, steps_done: int, num_batches: int, explainer: Explainer) -> dict[str, Any]:
    """Find the operator that raised in strict mode.

    The step is repeated with every operator recorded. For an evaluation, only the message is known.

    Args:
        error: The error of strict mode, for which `is_refusal` is True.
        steps_done: Number of steps completed before the error.
        num_batches: Number of batches in an epoch.
        explainer: The state of the replica.

    Returns:
        JSON values with step, message and, if they are known, operator, module, phase and remedy.
    """
    replica, message = explainer.replica, str(error).split(". ")[0]
    if not replica.model.training:
        return {"step": steps_done, "phase": "evaluation", "message": message}
    number = steps_done % num_batches
    entry = StepEntry(steps_done + 1, steps_done // num_batches + 1, number, torch.empty(0), None)
    batch = explainer.load(explainer.redraw(entry), entry)
    raised = find_refused(
        lambda: training_step(replica, batch, explainer.config.train), replica.optimizer, replica.model
    )
    found: dict[str, Any] = {"step": entry.step, "message": message}
    if raised is not None:
        explanation = explain_operator(raised.operator, explainer.device.type, numerics_flags())
        found |= asdict(raised) | {"remedy": [item.as_dict() for item in explanation.remedy]}
    return found
