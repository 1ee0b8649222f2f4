"""Checkpoint files: written atomically, and read only if every byte matches its digest.

A checkpoint is a folder of three files:

- `model.safetensors`: parameters and buffers.
- `optimizer.pt`: state of optimizer and scheduler, and everything else that a step reads. It is loaded with
  `weights_only=True`, so that nothing in it is executed.
- `state.json`: step, position in the data, random generators and digests. It is written last and has the digests of
  the other files.
"""

import base64
import io
import json
import mmap
import os
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.utils.serialization import config as serialization_config

from dreplica.errors import DreplicaError

SCHEMA = 2
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.pt", "state.json"
_SAFETENSORS_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


class CheckpointError(DreplicaError):
    """A checkpoint that cannot be restored, and the reason."""

    default_code = "checkpoint"


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint."""

    tensors: dict[str, Tensor]
    """Parameters and buffers of the model on the CPU, by name."""
    optimizer: dict[str, Any]
    """Tensors and plain values of `optimizer.pt`."""
    state: dict[str, Any]
    """JSON values of `state.json`."""


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step_{step:06}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's `checkpoints` folder, newest first, valid or not."""
    if not folder.is_dir():
        return []
    steps = {path: _STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir()}
    found = [(int(match[1]), path) for path, match in steps.items() if match]
    return [path for _, path in sorted(found, reverse=True)]


def prune_checkpoints(folder: Path, keep: int, part: str | None = None, unusable: Collection[str] = ()) -> None:
    """Remove all but the newest checkpoints.

    Args:
        folder: A run's `checkpoints` folder.
        keep: Number of checkpoints to keep.
        part: Folder within each checkpoint to remove. None to remove whole checkpoints.
        unusable: Names of checkpoints that do not count, and are removed once there are enough others.

    Raises:
        OSError: A checkpoint cannot be removed.
    """
    newest_first = sorted(list_checkpoints(folder), key=lambda path: path.name in unusable)
    places = [path if part is None else path / part for path in newest_first]
    for place in [place for place in places if place.is_dir()][keep:]:
        # Rename first: a half removed checkpoint must not be taken for a damaged one.
        doomed = place.with_name(f".{place.name}.{os.getpid()}.old")
        place.rename(doomed)
        shutil.rmtree(doomed)
        if part is not None:
            with suppress(OSError):  # other parts remain, or another replica has removed it
                place.parent.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of killed processes. No process may be writing to the folder."""
    for pattern in (".*.tmp", ".*.old", "step_*/.*.tmp", "step_*/.*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(place: Path, contents: Contents) -> None:
    """Write a checkpoint to a temporary folder, flush it to the disk, and rename it to `place`.

    Raises:
        OSError: The checkpoint cannot be written. `place` is unchanged.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _make_folder(place.parent)
        temporary.mkdir()
        in_file = _in_safetensors(contents.tensors)
        rest = {name: tensor for name, tensor in contents.tensors.items() if name not in in_file}
        with ThreadPoolExecutor(1, "dreplica-flush") as executor:
            _write_model(temporary / MODEL_FILE, in_file)
            model_digest = executor.submit(_flush_and_digest, temporary / MODEL_FILE)
            _write_optimizer(temporary / OPTIMIZER_FILE, {**contents.optimizer, "tensors": rest})
            optimizer_digest = _flush_and_digest(temporary / OPTIMIZER_FILE)
            files = {MODEL_FILE: model_digest.result(), OPTIMIZER_FILE: optimizer_digest}
        state = {"schema": SCHEMA, **contents.state, "files": files}
        with (temporary / STATE_FILE).open("w", encoding="utf-8") as file:
            json.dump(state | {"digest": _digest_state(state)}, file)
            file.write("\n")
        for name in (STATE_FILE, "."):
            flush(temporary / name)
        if place.exists():  # it could not be restored
            place.rename(place.with_name(f".{place.name}.{os.getpid()}.old"))
        temporary.rename(place)
        flush(place.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(place.with_name(f".{place.name}.{os.getpid()}.old"), ignore_errors=True)


def read_files(place: Path) -> dict[str, bytes]:
    """Read the three files of a checkpoint.

    Returns:
        The files' contents, by name.

    Raises:
        CheckpointError: A file is missing (`file-missing`) or cannot be read (`unreadable`).
    """
    try:
        return {name: (place / name).read_bytes() for name in (STATE_FILE, MODEL_FILE, OPTIMIZER_FILE)}
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise CheckpointError(f"{name} is missing", code="file-missing", file=name) from None
    except OSError as error:
        name = Path(error.filename).name
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}", code="unreadable", file=name) from None


def parse(files: Mapping[str, bytes]) -> Contents:
    """Verify and load the files of a checkpoint.

    Args:
        files: The files' contents, by name.

    Returns:
        What was given to `write_checkpoint`.

    Raises:
        CheckpointError: A file does not match its digest (`damaged`), is of another schema (`unknown-schema`), or
            cannot be loaded (`not-loadable`).
    """
    try:
        state = json.loads(files[STATE_FILE])
        digest = state.pop("digest")
        schema, digests = state["schema"], {name: state["files"][name] for name in (MODEL_FILE, OPTIMIZER_FILE)}
    except (ValueError, KeyError, TypeError, AttributeError):
        text = f"{STATE_FILE} is damaged or was not written by dreplica"
        raise CheckpointError(text, code="damaged", file=STATE_FILE) from None
    if digest != _digest_state(state):
        raise _damaged(STATE_FILE)
    if schema != SCHEMA:
        text = f"unknown checkpoint schema: expected {SCHEMA}, got {schema}"
        raise CheckpointError(text, code="unknown-schema", expected=SCHEMA, got=schema)
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        if xxhash.xxh3_128_hexdigest(files[name]) != digests[name]:
            raise _damaged(name)
    try:
        tensors = load(files[MODEL_FILE])
    except (SafetensorError, ValueError, KeyError) as error:
        raise _not_loadable(MODEL_FILE, error) from None
    try:
        optimizer = torch.load(io.BytesIO(files[OPTIMIZER_FILE]), map_location="cpu", weights_only=True)
        return Contents({**tensors, **optimizer.pop("tensors")}, optimizer, state)
    except Exception as error:  # an untrusted pickle can raise anything
        raise _foreign_object(files[OPTIMIZER_FILE]) or _not_loadable(OPTIMIZER_FILE, error) from None


def rng_to_json(rng: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what `get_rng_state` returned to JSON values."""
    version, words, gauss = rng["python"]
    name, keys, position, has_gauss, cached = rng["numpy"]
    tensors = {key: base64.b64encode(rng[key].numpy().tobytes()).decode() for key in ("torch", "cuda") if key in rng}
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        **tensors,
    }


def rng_from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what `rng_to_json` returned back."""
    version, words, gauss = values["python"]
    name, keys, position, has_gauss, cached = values["numpy"]
    tensors = {
        key: torch.frombuffer(bytearray(base64.b64decode(values[key])), dtype=torch.uint8)
        for key in ("torch", "cuda")
        if key in values
    }
    return {
        "python": (version, tuple(words), gauss),
        "numpy": (name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached),
        **tensors,
    }


def _in_safetensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that safetensors supports, each under its first name only."""
    first_name = {id(tensor): name for name, tensor in reversed([*tensors.items()])}
    return {
        name: tensor.contiguous()
        for name, tensor in tensors.items()
        if tensor.layout is torch.strided and tensor.dtype in _SAFETENSORS_DTYPES and first_name[id(tensor)] == name
    }


def _write_model(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def _write_optimizer(path: Path, values: dict[str, Any]) -> None:
    try:
        # torch's checksums take as long as the writing, and `state.json` has better ones.
        with serialization_config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            torch.save(values, path)
    except RuntimeError as error:  # torch reports a full disk this way
        raise OSError(f"{path.name}: {_first_line(error)}") from error


def _flush_and_digest(path: Path) -> str:
    flush(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


def _digest_state(state: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, and flush each entry to the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk.

    Raises:
        OSError: The disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(name: str) -> CheckpointError:
    return CheckpointError(f"{name} does not match its digest", code="damaged", file=name)


def _foreign_object(content: bytes) -> CheckpointError | None:
    """Return the error for a file that contains objects of classes that are not loaded, or None if it has none."""
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except Exception:  # not a file of torch.save
        return None
    if not classes:
        return None
    text = (
        f"cannot load {OPTIMIZER_FILE}: it contains {', '.join(sorted(classes))}, and only plain values are loaded. "
        "Leave such objects out of the state_dict of the optimizer, scheduler or scaler, and save the state_dict of a "
        "scheduler within a scheduler instead"
    )
    return CheckpointError(text, code="not-loadable", file=OPTIMIZER_FILE, classes=sorted(classes))


def _not_loadable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot load {name}: {_first_line(error)}", code="not-loadable", file=name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
