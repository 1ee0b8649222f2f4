"""Checks that an optimizer holds the parameters of a model, each trainable one exactly once."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.wiring.fault import WiringError
from dreplica.agreement.wiring.parameters import is_dtensor, optimized_parameters
from dreplica.state.stages import named_weights


def optimizer_faults(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module | None = None
) -> Iterator[WiringError]:
    """Yield what is wrong with the parameters that an optimizer holds.

    Args:
        model: The model to train.
        optimizer: The optimizer that trains it.
        criterion: The loss module, if the optimizer may train its parameters, too.
    """
    own = optimized_parameters(model)
    names = {id(parameter): name for name, parameter in own.items()}
    if criterion is not None:
        names = {id(each): f"criterion.{name}" for name, each in named_weights(criterion).items()} | names
    held = held_parameters(optimizer)
    kind = type(optimizer).__name__
    orphans = [parameter for parameter in held if id(parameter) not in names]
    if orphans:
        yield orphaned(list(own.values()), held, orphans, kind)
    counts = Counter(id(parameter) for parameter in held)
    missing = [name for name, parameter in own.items() if parameter.requires_grad and not counts[id(parameter)]]
    if missing:
        yield WiringError(
            f"{len(missing)} trainable parameters are in no parameter group of the {kind} optimizer and never change. "
            f"The first is {missing[0]!r}.",
            code="parameters-not-optimized",
            tensor=missing[0],
            remedies=[
                Remedy.of("create-optimizer-last", optimizer=kind),
                Remedy.of("freeze-parameter", tensor=missing[0]),
            ],
            optimizer=kind,
            missing=missing,
        )
    duplicates = [names[key] for key, count in counts.items() if count > 1 and key in names]
    if duplicates:
        yield WiringError(
            f"{len(duplicates)} parameters are more than once in the {kind} optimizer and are updated more than once "
            f"per step. The first is {duplicates[0]!r}.",
            code="parameters-not-optimized",
            tensor=duplicates[0],
            remedies=[Remedy.of("pass-each-once", optimizer=kind)],
            optimizer=kind,
            duplicates=duplicates,
        )


def held_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in all groups of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def orphaned(own: Sequence[Tensor], held: Sequence[Tensor], orphans: Sequence[Tensor], kind: str) -> WiringError:
    """Return the fault of an optimizer that holds parameters of something else.

    Args:
        own: The model's parameters.
        held: The optimizer's parameters.
        orphans: Those of them that the model does not have.
        kind: The optimizer's class.
    """
    origin, explanation = _explain_orphans(own, held, orphans)
    remedies = [Remedy.of("create-optimizer-last", optimizer=kind)]
    if origin == "copied":
        remedies.append(Remedy.of("copy-together"))
    return WiringError(
        f"{len(orphans)} of the {len(held)} parameters in the {kind} optimizer are not parameters of this model, "
        f"so optimizer.step() does not train the model. {explanation}",
        code="optimizer-not-bound",
        remedies=remedies,
        optimizer=kind,
        origin=origin,
        num_orphans=len(orphans),
        num_parameters=len(held),
    )


def _explain_orphans(own: Sequence[Tensor], held: Sequence[Tensor], orphans: Sequence[Tensor]) -> tuple[str, str]:
    """Return where the optimizer's foreign parameters come from, as a word and as a sentence.

    They are judged by their classes, shapes, devices and dtypes, compared with the parameters that the optimizer lacks.
    """
    held_ids = set(map(id, held))
    lacking = [parameter for parameter in own if id(parameter) not in held_ids]
    converted = _conversion(lacking, orphans)
    if converted is not None:
        return converted
    if len(orphans) < len(held):
        text = "The others are: a layer of the model was replaced or extended after the optimizer was created."
        return "replaced", text
    if _shapes(orphans) - _shapes(own):
        text = "Their shapes differ from this model's: the optimizer was created for another model."
        return "another-model", text
    return "copied", (
        "Their shapes are those of this model: the optimizer belongs to another instance of the model, or the model or "
        "the optimizer was deep-copied alone. copy.deepcopy(optimizer) also copies the parameters, so the copies "
        "belong to no model, and no model is trained. load_state_dict(assign=True) replaces the parameters, too."
    )


def _conversion(lacking: Sequence[Tensor], orphans: Sequence[Tensor]) -> tuple[str, str] | None:
    """Return the conversion that replaced the model's parameters after the optimizer was created, if one is proved."""
    if not lacking:
        return None
    if all(getattr(each, "_is_flat_param", False) for each in lacking):  # of FullyShardedDataParallel
        within = Counter(tuple(shape) for each in lacking for shape in getattr(each, "_shapes", ()))
        if not _shapes(orphans) - within:
            return "sharded", _made_before("the model was wrapped in FullyShardedDataParallel")
    if _shapes(orphans) - _shapes(lacking):
        return None
    if all(map(is_dtensor, lacking)) and not any(map(is_dtensor, orphans)):
        return "sharded", _made_before("the model was sharded (fully_shard, parallelize_module)")
    for attribute in ("device", "dtype"):
        before = {str(getattr(each, attribute)).removeprefix("torch.") for each in orphans}
        after = {str(getattr(each, attribute)).removeprefix("torch.") for each in lacking}
        if not before & after:
            move = f"{', '.join(sorted(before))} to {', '.join(sorted(after))}"
            call = "to_empty" if before == {"meta"} else "to"
            return "moved", _made_before(f"the model was converted from {move}, as .{call}() does,")
    before, after = ({type(each).__name__ for each in parameters} for parameters in (orphans, lacking))
    if not before & after:
        return "converted", _made_before(f"the parameters were converted from {_listed(before)} to {_listed(after)}")
    return None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _made_before(change: str) -> str:
    return f"The optimizer was made before {change}, which replaced the parameters."


def _shapes(parameters: Sequence[Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(parameter.shape) for parameter in parameters)
