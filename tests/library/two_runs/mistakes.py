"""The mistakes in `scripts/`, with the first difference that each must show between two runs.

The expectations follow from the code of the scripts. They were written down before the scripts were run.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBRARY = "def scale(inputs, factor={factor}):\n    return inputs * factor\n"
_METADATA = "Metadata-Version: 2.1\nName: tiny-augment\nVersion: {version}\n"


def unchanged(work: Path) -> None:
    """Leave the folder without a change."""


@dataclass(frozen=True)
class Mistake:
    """A mistake, where two runs with it first differ, and the words of its fix."""

    expected: Mapping[str, str | None]
    """Stage to a pattern for its tensor, None if no tensor is named. More than one stage only where threads race."""
    fix: str
    """Text that the section of that stage must contain."""
    steps: Sequence[int] = (1,)
    """Step of the first difference. More than one only where threads race."""
    phase: str | None = None
    libraries: tuple[str | None, str | None] = (None, None)
    """For each run, a folder that its PYTHONPATH begins with."""
    before: Callable[[Path], None] = unchanged
    """Prepares the folder in which both runs are started."""
    between: Callable[[Path], None] = unchanged
    """Changes the folder between the runs."""
    equal_in_empty_folder: bool = False
    """True if the runs are equal where each starts in an empty folder, so that a left-over file is the reason."""


def _write_table(work: Path) -> None:
    rows = [[(7 * row + 3 * column) % 10 / 10 for column in range(8)] + [row % 3] for row in range(48)]
    (work / "samples.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))


def _edit_table(work: Path) -> None:
    """Change one value of the sample with index 20, which is in the third batch of eight."""
    lines = (work / "samples.csv").read_text().splitlines()
    lines[20] = "0.05," + lines[20].partition(",")[2]
    (work / "samples.csv").write_text("\n".join(lines))


def _write_files(work: Path) -> None:
    (work / "samples").mkdir()
    for number in range(24):
        path = work / "samples" / f"{number:02}.txt"
        path.write_text("\n".join(str((number + column) / 32) for column in range(8)))
        os.utime(path, ns=(0, 10**9 * (1 + number)))


def _touch_file(work: Path) -> None:
    """Give the first file the time that an edit would give it."""
    os.utime(work / "samples" / "00.txt", ns=(0, 10**9 * 100))


def _install_libraries(work: Path) -> None:
    for version, factor in (("1.0", 1.0), ("1.1", 1.5)):
        metadata = work / version / f"tiny_augment-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(_METADATA.format(version=version))
        (work / version / "tiny_augment.py").write_text(_LIBRARY.format(factor=factor))


MISTAKES: Mapping[str, Mistake] = {
    "cached_statistics": Mistake({"batch": "inputs"}, "write the cache, then read it", equal_in_empty_folder=True),
    "leftover_checkpoint": Mistake(
        {"weights": r"0\.weight"}, "resume only if the command says so", steps=(0,), equal_in_empty_folder=True
    ),
    "hash_order": Mistake({"batch": "labels"}, "sorted(names)"),
    "worker_seeds": Mistake({"batch": "inputs"}, "worker_init_fn=seed_worker"),
    "elapsed_time": Mistake({"optimizer": r"group0\.lr"}, "LambdaLR"),
    "weight_decay_sets": Mistake({"optimizer": r"group\d\.weight_decay"}, "for name in sorted(decay)"),
    "split_before_seed": Mistake({"batch": "inputs"}, "random_split(dataset, [6, 2], generator="),
    "nondeterministic_operator": Mistake({"output": "loss"}, "torch.use_deterministic_algorithms(True)"),
    "prefetch_thread": Mistake(
        {"batch": "inputs", "output": "loss", "rng": r"torch\.cpu"},
        "torch.randn(4, 8, generator=generator)",
        steps=range(21),
    ),
    "library_version": Mistake(
        {"batch": "inputs"},
        "pip freeze > requirements.lock.txt",
        before=_install_libraries,
        libraries=("1.0", "1.1"),
    ),
    "changed_file": Mistake({"batch": "inputs"}, "sha256", steps=(3,), before=_write_table, between=_edit_table),
    # Siblings.
    "leftover_optimizer": Mistake(
        {"optimizer": r"0\.weight\.momentum_buffer"}, "load the optimizer's state only with", equal_in_empty_folder=True
    ),
    "leftover_clipping": Mistake({"gradients": r"2\.bias"}, "keep the history in memory", equal_in_empty_folder=True),
    "leftover_average": Mistake(
        {"weights": r"0\.weight"}, "load it only with `--resume`", steps=(4,), equal_in_empty_folder=True
    ),
    "evaluation_mode": Mistake({"buffers": r"1\.running_mean"}, "model.eval()", equal_in_empty_folder=True),
    "extra_draw": Mistake(
        {"rng": r"torch\.cpu"}, "draw from another generator", steps=(3,), equal_in_empty_folder=True
    ),
    "unseeded_build": Mistake({"weights": r"0\.weight"}, "torch.manual_seed(0)", steps=(0,)),
    "uninitialized_memory": Mistake({"weights": "gain"}, "nn.init", steps=(0,)),
    "hash_features": Mistake({"batch": "inputs"}, "hashlib.blake2b"),
    "parameter_order": Mistake({"optimizer": None}, "the order of `named_parameters`"),
    "file_times": Mistake({"batch": "inputs"}, "sorted(Path(", before=_write_files, between=_touch_file),
    "unordered_results": Mistake({"batch": "inputs"}, "pool.map("),
    "own_generator": Mistake({"batch": "inputs"}, "numpy.random.default_rng((0, epoch, index))"),
    "sampler_seed": Mistake({"indices": "indices"}, "torch.Generator().manual_seed(0)"),
    "random_predictions": Mistake(
        {"predictions": "logits"}, "numpy.random.default_rng(0)", steps=(6,), phase="evaluation"
    ),
}
"""Script to its mistake."""
