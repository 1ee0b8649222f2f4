"""Checks of the machine's resources, as the kernel reports them: CPUs, memory, file descriptors and disk."""

import os
import resource
import shutil
from pathlib import Path

import torch

from dreplica.commands.doctor.check import Check
from dreplica.environment.hardware import cpu_limit

_SHM = Path("/dev/shm")
_EDAC = Path("/sys/devices/system/edac/mc")
_GIB = 2**30
_SHM_WANTED = 4 * 256 * 3 * 224 * 224 * 4
"""Bytes of the four batches that two workers prefetch, each of 256 float32 images of 224 x 224."""
_DESCRIPTORS_WANTED = 4096
_DISK_WANTED = 5 * _GIB
_DISK_NEEDED = _GIB // 10


def check_machine() -> list[Check]:
    """Check this machine, or the container of this process."""
    return [check_threads(), check_shared_memory(), check_descriptors(), check_disk(Path.cwd()), check_memory_errors()]


def check_threads(differ_at: str | None = None) -> Check:
    """Check the default number of threads of an operator.

    Args:
        differ_at: The first place at which a training with that many threads diverges from one with a single thread,
            if known.
    """
    threads, cpus, limit = torch.get_num_threads(), len(os.sched_getaffinity(0)), cpu_limit()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_DYNAMIC")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    seen = f"{threads} by default on {cpus} CPU{'s' * (cpus > 1)}"
    seen += f" of which a cgroup grants {limit:g}" if limit is not None and limit < cpus else ""
    seen += "".join(f", {name}={value}" for name, value in variables.items())
    problems, remedy = [], []
    if "OMP_NUM_THREADS" not in variables and threads > 1:
        seen += ", and 1 under torchrun with several processes, which sets OMP_NUM_THREADS where it is not set"
        problems.append("The same script uses a different number of threads with torchrun than without it.")
        remedy.append("export OMP_NUM_THREADS=1")
    if differ_at is not None:
        problems.append(f"Sums are split by threads: here {threads} threads and 1 thread diverge at {differ_at}.")
    if limit is not None and threads > limit:
        problems.append("More threads than the cgroup grants CPUs wait for each other.")
        remedy = remedy or [f"export OMP_NUM_THREADS={max(1, int(limit))}"]
    if threads_follow_the_load():
        problems.append(
            "OMP_DYNAMIC lets the number of threads follow the load: sums are split differently each time, and "
            "a backward pass that waits for as many threads as it asked for can hang (seen with torch 2.15)."
        )
        remedy.append("unset OMP_DYNAMIC")
    if not remedy:
        return Check("threads", "ok", seen, " ".join(problems))
    why = " ".join([*problems, "dreplica sets determinism.threads; a custom training loop must set it."])
    return Check("threads", "warn", seen, why, (*remedy, "torch.set_num_threads(1)  # in the code"))


def threads_follow_the_load() -> bool:
    """Return True if OpenMP may give an operator fewer threads than it asks for."""
    return os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true"


def check_shared_memory(folder: Path = _SHM) -> Check:
    """Check /dev/shm, through which loader workers pass batches."""
    name = "shared memory"
    why = "Loader workers pass batches through it. A batch that does not fit ends its worker with a bus error."
    remedy = (
        f"mount -o remount,size=8G {folder}  # in a container: docker run --shm-size=8g",
        "--data.num_workers 0  # or: load in the training process",
    )
    if not os.access(folder, os.W_OK):
        return Check(name, "bad", f"{folder} does not exist, or cannot be written to", why, remedy)
    free = shutil.disk_usage(folder).free
    seen = f"{_size(free)} free in {folder}"
    if free < _SHM_WANTED:
        return Check(
            name, "warn", f"{seen}; four batches of 256 images of 224 x 224 take {_size(_SHM_WANTED)}", why, remedy
        )
    return Check(name, "ok", seen, why)


def check_descriptors() -> Check:
    """Check the limit on open files."""
    name = "open files"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    why = "torch passes tensors between processes as open files. A loader that reaches the limit ends the run."
    seen = f"{_limit(soft)} allowed, {_limit(hard)} at most"
    if soft != resource.RLIM_INFINITY and soft < _DESCRIPTORS_WANTED:
        if hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS_WANTED:
            remedy = "docker run --ulimit nofile=65536  # outside of containers: nofile in /etc/security/limits.conf"
        else:
            remedy = f"ulimit -n {_DESCRIPTORS_WANTED}"
        return Check(name, "warn", seen, why, (remedy,))
    return Check(name, "ok", seen, why)


def check_disk(folder: Path) -> Check:
    """Check the disk space for run folders."""
    name = "disk"
    free = shutil.disk_usage(folder).free
    why = "Checkpoints are written there. One that cannot be written ends the run."
    remedy = ("--run.root FOLDER  # with more space", "--checkpoint.keep 1")
    seen = f"{_size(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check(name, "warn", f"{folder} cannot be written to", why, remedy[:1])
    if free < _DISK_NEEDED:
        return Check(name, "bad", seen, why, remedy)
    return Check(name, "warn" if free < _DISK_WANTED else "ok", seen, why, remedy if free < _DISK_WANTED else ())


def check_memory_errors(folder: Path = _EDAC) -> Check:
    """Check the errors that the memory controllers have counted since the machine started."""
    name = "memory errors"
    why = "Memory without error correction, or with uncorrectable errors, flips bits that only a comparison detects."
    controllers = [place for place in sorted(folder.glob("mc*")) if (place / "ce_count").exists()]
    if not controllers:
        seen = f"no memory controller reports in {folder}: no ECC memory, no driver, or a virtual machine"
        return Check(name, "unknown", seen, why)
    corrected, uncorrected = (
        sum(int((place / f"{kind}_count").read_text()) for place in controllers) for kind in ("ce", "ue")
    )
    seen = f"{corrected} corrected, {uncorrected} uncorrected in {len(controllers)} controllers"
    remedy = ("edac-util -v  # names the module; replace it",)
    if uncorrected:
        return Check(name, "bad", seen, why, remedy)
    return Check(name, "warn" if corrected else "ok", seen, why, remedy if corrected else ())


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
