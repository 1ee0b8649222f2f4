"""Checks of the results of the doctor's processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from dreplica.commands.doctor.check import Check
from dreplica.commands.doctor.operator_probes import unstopped

STRICT_FLAGS: Mapping[str, Any] = {
    "deterministic_algorithms": True,
    "deterministic_warn_only": False,
    "threads": 1,
    "cudnn_benchmark": False,
    "cudnn_deterministic": True,
    "cudnn_tf32": False,
    "matmul_tf32": False,
}
"""Values of `numerics_flags` after strict mode has been applied."""


def first_difference(places: Mapping[str, str], others: Mapping[str, str]) -> str | None:
    """Return the first place, in causal order, at which digests differ, or None."""
    return next((place for place, digest in places.items() if others.get(place) != digest), None)


def judge_flags(flags: Sequence[Mapping[str, Any]]) -> Check:
    """Check the flags of each process after strict mode was applied."""
    wrong = {
        f"{name} is {row[name]} instead of {value}": None
        for row in flags
        for name, value in STRICT_FLAGS.items()
        if row[name] != value
    }
    name = "strict mode"
    why = "If flags do not keep the values that dreplica sets, operators may round differently each time."
    if wrong:
        remedy = ("python -v -c 'import torch'  # shows imports (sitecustomize, .pth files) that may set flags",)
        return Check(name, "bad", "; ".join(wrong), why, remedy)
    return Check(name, "ok", f"all of {len(STRICT_FLAGS)} flags take effect", why)


def judge_devices(trials: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Check]:
    """Check each device.

    Args:
        trials: For each process, device (`cpu`, `cuda:0`) to `name` and `runs` (digests), or to `error`.
    """
    checks = [_judge_device(device, [trial[device] for trial in trials]) for device in trials[0]]
    first: dict[str, str] = {}
    for device, found in trials[0].items():
        if "error" in found:
            continue
        twin = first.setdefault(found["name"], device)
        place = first_difference(trials[0][twin]["runs"][0], found["runs"][0])
        if place is not None:
            checks.append(
                Check(
                    f"{twin} against {device}",
                    "bad",
                    f"both are {found['name']}, and diverge at {place}",
                    "Two GPUs of one model computed different results from the same inputs: one of them is faulty.",
                    (
                        "nvidia-smi -q -d ECC,ROW_REMAPPER",
                        "dreplica train --replicas 3  # with a third GPU, so that the verdict names the faulty one",
                    ),
                )
            )
    return checks


def _judge_device(device: str, found: Sequence[Mapping[str, Any]]) -> Check:
    name = f"self-test on {device}"
    why = "The same training from the same seed, in strict mode, must give the same bits each time."
    errors = list(dict.fromkeys(row["error"] for row in found if "error" in row))
    if errors:
        return Check(name, "bad", f"strict mode raised: {'; '.join(errors)}", why, ("follow the message",))
    runs = [run for row in found for run in row["runs"]]
    within = next(filter(None, (first_difference(*row["runs"]) for row in found)), None)
    if within is not None:
        remedy = ("dreplica train --replicas 3  # names the operator, and the replica if it is one of three",)
        return Check(name, "bad", f"two runs in one process diverge at {within}", why, remedy)
    between = next(filter(None, (first_difference(runs[0], run) for run in runs[1:])), None)
    if between is not None:
        remedy = ("dreplica train --replicas 3  # names the operator, and the replica if it is one of three",)
        return Check(name, "bad", f"two processes diverge at {between}", why, remedy)
    tensors = f"{len(runs[0])} digests"
    return Check(name, "ok", f"{len(runs)} runs in {len(found)} processes agree in all of {tensors}", why)


def judge_probes(probes: Mapping[str, Mapping[str, str]]) -> list[Check]:
    """Check the probes of each device: device to operator to its outcome in strict mode."""
    return [_judge_probes(device, outcomes) for device, outcomes in probes.items()]


def _judge_probes(device: str, outcomes: Mapping[str, str]) -> Check:
    name = f"operators on {device}"
    why = "Strict mode stops at an operator that has no deterministic algorithm, so that replicas do not diverge."
    raising = [operator.removeprefix("aten.") for operator, outcome in outcomes.items() if outcome == "raises"]
    running = [operator for operator, outcome in outcomes.items() if outcome == "runs"]
    failed = {key: text for key, text in outcomes.items() if text not in {"raises", "runs"}}
    seen = f"of {len(outcomes)} documented as nondeterministic somewhere, strict mode stops at {len(raising)}"
    seen += f" ({', '.join(raising)})" if raising else ""
    seen += f", {len(running)} run"
    passed = unstopped(outcomes, device.partition(":")[0])
    if passed:
        seen = f"{seen}; documented to raise, and ran: {', '.join(passed)}"
        why = f"{why} Either this release has such an algorithm for them, or strict mode does not detect them."
        return Check(name, "warn", seen, why, (_COMPARE,))
    if failed:
        return Check(name, "unknown", f"{seen}; could not be tried: {failed}", why)
    return Check(name, "ok", seen, why)


_COMPARE = "dreplica train --replicas 2  # with a model that uses them: replicas diverge if they are not deterministic"


def judge_joining(joined: Sequence[Mapping[str, Any]]) -> Check:
    """Check that the processes reach each other, from what each gathered over gloo (`joined`) or its `error`."""
    name = "gloo"
    why = "Replicas exchange indices and digests over it."
    all_ranks = list(range(len(joined)))
    errors = list(dict.fromkeys(row["error"] for row in joined if row.get("error")))
    if errors or any(row.get("joined") != all_ranks for row in joined):
        remedy = ("export GLOO_SOCKET_IFNAME=lo  # for one machine; for several, the interface that connects them",)
        return Check(name, "bad", "; ".join(errors) or "processes do not reach each other", why, remedy)
    return Check(name, "ok", f"{len(joined)} processes on this machine reach each other", why)
