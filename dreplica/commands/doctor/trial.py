"""One of the doctor's processes: train a small network in strict mode, twice on each device, and print every digest.

It prints one line of JSON for the training and one for the rendezvous, each after `MARK`. Errors are part of them.
"""

import json
import os
import sys
import traceback
from typing import Any, TextIO

import torch
from torch import nn

from dreplica.commands.doctor.machine import threads_follow_the_load
from dreplica.commands.doctor.operator_probes import run_probes
from dreplica.config.schema import DeterminismConfig
from dreplica.distributed.process_group import env_rank, open_world
from dreplica.environment.determinism import apply_determinism, numerics_flags, set_environment
from dreplica.state.fingerprint.fingerprint import fingerprint

JOIN_SECONDS = 30.0
MARK = "dreplica-doctor: "
"""Prefix of these lines, since modules that Python imports at its start may print, too."""
_STEPS = 2


def main() -> None:
    """Run this process, and exit it on an error."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that the output of libraries does not mix with the lines
    threads = torch.get_num_threads()
    config = DeterminismConfig()
    set_environment(config)
    apply_determinism(config)
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found: dict[str, Any] = {
        "hash": hash("dreplica"),
        "flags": numerics_flags(),
        "devices": {name: _try_device(torch.device(name)) for name in names},
    }
    if env_rank() == 0:
        found["probes"] = {name: run_probes(torch.device(name)) for name in names[: 2 if len(names) > 1 else 1]}
        if not threads_follow_the_load():  # with OMP_DYNAMIC, several threads may hang
            torch.set_num_threads(threads)
            found["threads"] = train(torch.device("cpu"))
            torch.set_num_threads(config.threads)
    _print(output, found)
    try:
        with open_world(JOIN_SECONDS) as world:
            _print(output, {"joined": world.channel.gather(world.replica_id)})
    except Exception as error:
        traceback.print_exc()
        _print(output, {"joined": None, "error": str(error) or type(error).__name__})
        sys.stderr.flush()
        os._exit(1)  # as `open_world` requires: a normal exit waits for the other process


def train(device: torch.device) -> dict[str, str]:
    """Train a few steps from a fixed seed on fixed data.

    Returns:
        Place (step, stage and tensor, in causal order) to digest.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 13 * 13, 10),
    )
    inputs, labels = torch.randn(32, 3, 32, 32).to(device), torch.randint(10, (32,)).to(device)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    places: dict[str, str] = {}
    for step in range(1, _STEPS + 1):
        optimizer.zero_grad()
        logits = model(inputs)
        nn.functional.cross_entropy(logits, labels).backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        optimizer.step()
        stages = {
            "buffers": dict(model.named_buffers()),
            "output": {"logits": logits.detach()},
            "gradients": gradients,
            "weights": dict(model.named_parameters()),
        }
        for stage, tensors in stages.items():
            digests = fingerprint(tensors)
            places |= {f"step {step}, {stage}, {name}": digest for name, digest in digests.items()}
    return places


def _try_device(device: torch.device) -> dict[str, Any]:
    """Return the digests of two runs on a device, or an `error`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        return {"name": name, "runs": [train(device), train(device)]}
    except RuntimeError as error:  # errors of strict mode included
        return {"name": name, "error": str(error).splitlines()[0]}


def _print(output: TextIO, found: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(found)}", file=output, flush=True)


if __name__ == "__main__":
    main()
