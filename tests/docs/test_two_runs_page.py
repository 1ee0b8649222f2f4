"""The Python examples of the page "My two runs differ" run, and every stage has what a reader needs."""

import argparse
import copy
import hashlib
import os
import queue
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import dreplica
from dreplica.commands.explain import EXPLAINED_STAGES, stage_sections
from dreplica.config.paths import STAGES_PAGE

_EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MISTAKE = re.compile(r"^### (.+)\n", re.MULTILINE)
SECTIONS = stage_sections(STAGES_PAGE.read_text(encoding="utf-8"))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names that the examples use, in an empty folder. Flags and generators are restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    (tmp_path / "samples.csv").write_text("1,2\n")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    flags = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    inputs, labels = torch.randn(8, 8), torch.arange(8) % 3
    yield {
        **{each.__name__: each for each in (argparse, copy, dreplica, hashlib, nn, numpy, os, queue, random)},
        **{each.__name__: each for each in (threading, torch, Path, ThreadPoolExecutor)},
        **{each.__name__: each for each in (AveragedModel, get_ema_multi_avg_fn)},
        **{each.__name__: each for each in (DataLoader, DistributedSampler, random_split)},
        "nn": nn,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "scaler": torch.amp.GradScaler("cpu"),
        "loss_of": lambda each: nn.functional.cross_entropy(each(inputs), labels),
        "arguments": argparse.Namespace(resume=None),
        "dataset": TensorDataset(inputs, labels),
        "inputs": inputs,
        "labels": labels,
    }
    torch._inductor.config.fallback_random = False
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(flags[0])
    cudnn.benchmark, cudnn.allow_tf32 = flags[1:]
    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])


@pytest.mark.process
@pytest.mark.parametrize("stage", EXPLAINED_STAGES)
def test_examples_run(stage: str, names: dict[str, Any]) -> None:
    for example in _EXAMPLE.findall(SECTIONS[stage]):
        exec(compile(example, f"docs/two_runs_differ.md, {stage}", "exec"), names)


@pytest.mark.parametrize("stage", EXPLAINED_STAGES)
def test_every_mistake_is_confirmed_and_fixed(stage: str) -> None:
    """A mistake is confirmed and fixed in its place, or in another section that it names."""
    _, *parts = _MISTAKE.split(SECTIONS[stage])
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        elsewhere = re.findall(r"`dreplica explain (\w+)`", text)
        assert elsewhere or ("\nConfirm: " in text and "\nFix: " in text), title
        assert set(elsewhere) < set(EXPLAINED_STAGES)
