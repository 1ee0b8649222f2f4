"""The catalogue of warnings: every code with the template of its text."""

from collections.abc import Mapping
from typing import Any

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.rendering import plain, render

WARNINGS: Mapping[str, str] = {
    "optimizer-not-bound": "{problem} To fix it: {fix}",
    "scheduler-not-bound": "{problem} To fix it: {fix}",
    "storage-shared": "{problem} To fix it: {fix}",
    "not-finite": (
        "{kind} {tensor} has {num_nan:,} NaN and {num_infinite:,} infinite values of {num_elements:,} {when}{more}. "
        "{fix}"
    ),
    "loss-not-finite": (
        "the loss is {value} at step {step}, for the first time. Look for a division by 0 or log(0) in this step, and "
        "reduce the learning rate or clip the gradients if earlier losses grew"
    ),
    "parameter-not-optimized": (
        "{tensors} did not change in {steps} steps, although there is a gradient: no parameter group of an optimizer "
        "holds it. Add it to the optimizer, or freeze it with requires_grad_(False)"
    ),
    "parameter-rate-zero": (
        "{tensors} did not change in {steps} steps, although there is a gradient: the learning rate of its parameter "
        "group is 0. Set its lr, or freeze it with requires_grad_(False)"
    ),
    "parameter-unmoved": (
        "{tensors} did not change in {steps} steps, although there is a gradient: its optimizer does not step, or each "
        "update is lost in rounding ({dtype}). Call the optimizer's step(), or keep float32 weights"
    ),
    "learning-rate-zero": (
        "the learning rate of every parameter group has been 0 for {steps} steps, since step {since}: no weight "
        "changes. Check the schedule: its number of steps, and whether it is stepped per batch or per epoch"
    ),
    "batches-identical": (
        "ranks {ranks} were given the same batches at steps {steps}: they do the same work. Give each rank its own "
        "part of the data: DistributedSampler(dataset), with sampler.set_epoch(epoch), or batches[rank::world_size]"
    ),
    "losses-identical": (
        "ranks {ranks} have the same loss, bit for bit, at steps {steps}: they were given the same batches. Give each "
        "rank its own part of the data: DistributedSampler(dataset), with sampler.set_epoch(epoch)"
    ),
    "dropout-identical": (
        "ranks {ranks} draw the same random numbers at steps {steps}, so {module} ({kind}) drops the same elements on "
        "all of them. After the build, seed each rank differently: torch.manual_seed(seed + rank)"
    ),
    "average-unmoved": (
        "{tensors} of the moving average {name} did not change in {steps} steps, while the weights did. Call its "
        "update after each optimizer.step(), with the model that is trained"
    ),
    "gradients-not-zeroed": (
        "the gradient of {tensor} was not set to zero between steps {before} and {step}: gradients of all steps add "
        "up. Call zero_grad() of {optimizer} once per step, before the backward pass"
    ),
}


def warning(code: str, /, **data: Any) -> Evidence:
    """Return the warning of a code of the catalogue.

    Args:
        code: A key of `WARNINGS`.
        **data: The fields of its text. Further ones are kept as data only.
    """
    return Evidence(code, render(WARNINGS[code], data), plain(data))
