"""Checks of the GPUs of this machine, as torch and nvidia-smi report them."""

from collections.abc import Sequence

import torch

from dreplica.commands.doctor.check import Check
from dreplica.environment.hardware import ask_nvidia_smi


def check_gpus() -> list[Check]:
    """Check the GPUs. Returns a single check if there are none."""
    rows = ask_nvidia_smi()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names:
        return [_none(rows)]
    return [_models(names), *_reported(rows)]


def _none(rows: list[dict[str, str]] | str) -> Check:
    if isinstance(rows, str) or not rows:
        return Check("GPUs", "ok", f"torch sees none, and {rows or 'nvidia-smi lists none'}; replicas run on the CPU")
    seen = f"nvidia-smi lists {len(rows)}, driver {rows[0]['driver_version']}, and torch sees none"
    why = f"This torch is built for CUDA {torch.version.cuda or 'none'}: the driver may be older, or the GPUs hidden."
    return Check(
        "GPUs", "warn", seen, why, ("echo $CUDA_VISIBLE_DEVICES", "python -c 'import torch; torch.cuda.init()'")
    )


def _models(names: Sequence[str]) -> Check:
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if len(set(names)) == 1:
        return Check("GPUs", "ok", counted)
    return Check(
        "GPUs",
        "warn",
        counted,
        "GPU models round differently: replicas on different models diverge.",
        ("export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,1  # of one model, as nvidia-smi numbers",),
    )


def _reported(rows: list[dict[str, str]] | str) -> list[Check]:
    if isinstance(rows, str):
        return [Check("GPU memory errors", "unknown", rows), Check("MIG", "unknown", rows)]
    return [_errors(rows), _mig(rows)]


def _errors(rows: Sequence[dict[str, str]]) -> Check:
    name = "GPU memory errors"
    why = "An uncorrected error is a wrong number. Without ECC, errors are not counted."
    remedy = ("nvidia-smi -q -d ECC,ROW_REMAPPER  # names the GPU; take it out of service if the errors continue",)
    corrected, uncorrected = (
        {row["index"]: int(row[f"ecc.errors.{kind}.volatile.total"]) for row in rows if _is_number(row, kind)}
        for kind in ("corrected", "uncorrected")
    )
    off = [row["index"] for row in rows if row["ecc.mode.current"] != "Enabled"]
    seen = f"since the driver was loaded: {_counts(corrected)} corrected, {_counts(uncorrected)} uncorrected"
    if off:
        seen += f"; ECC is not on for GPU {', '.join(off)}"
    if any(uncorrected.values()):
        return Check(name, "bad", seen, why, remedy)
    if any(corrected.values()):
        return Check(name, "warn", seen, why, remedy)
    if off:
        return Check(name, "warn", seen, why, ("sudo nvidia-smi -e 1  # and restart, where the GPU has ECC",))
    return Check(name, "ok", seen, why)


def _is_number(row: dict[str, str], kind: str) -> bool:
    return row[f"ecc.errors.{kind}.volatile.total"].isdecimal()  # `[N/A]` if unknown


def _counts(by_index: dict[str, int]) -> str:
    affected = {index: count for index, count in by_index.items() if count}
    return ", ".join(f"{count} on GPU {index}" for index, count in affected.items()) or "0"


def _mig(rows: Sequence[dict[str, str]]) -> Check:
    sliced = [row["index"] for row in rows if row["mig.mode.current"] == "Enabled"]
    if not sliced:
        return Check("MIG", "ok", "off")
    return Check(
        "MIG",
        "warn",
        f"on for GPU {', '.join(sliced)}",
        "Libraries choose kernels by the number of multiprocessors: slices of different sizes, and whole GPUs, may "
        "round differently.",
        ("nvidia-smi -L  # use slices of one size for all replicas",),
    )
