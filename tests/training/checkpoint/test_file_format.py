"""Checkpoint files: written atomically, and rejected if any byte differs from what was written."""

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor, nn

from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.training.checkpoint.async_writer import Saver
from dreplica.training.checkpoint.file_format import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointError,
    Contents,
    list_checkpoints,
    parse,
    prune_checkpoints,
    read_files,
    remove_leftovers,
    write_checkpoint,
)
from dreplica.training.checkpoint.replica_state import copy_state, restore_state
from tests.fixtures import tiny_model

POSITION = Position(2, 3, 17, 0.1 + 0.2, 24)


class Stateful(nn.Module):
    """State of every kind: tied weights, buffers that are not saved, a counter, a private generator."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model(5)
        self.tied = nn.Linear(5, 5)
        self.again = self.tied
        self.register_buffer("hidden", torch.rand(3), persistent=False)
        self.register_buffer("late", None)
        self.register_buffer("waves", torch.rand(2, dtype=torch.complex64))
        self.empty: Tensor = torch.empty(0)
        self.calls = 0
        self.seen: list[int] = []
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(inputs))
        self.late = torch.full((2,), float(self.calls))
        self.empty = torch.rand(1, generator=self.generator)
        return self.again(self.body(inputs))


def make(seed: int = 1) -> Replica:
    seed_generators(seed)
    model = Stateful()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 20)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, scheduler)


def take_steps(replica: Replica, count: int) -> None:
    for _ in range(count):
        replica.optimizer.zero_grad()
        replica.model(torch.rand(4, 3, 8, 8)).square().sum().backward()
        replica.optimizer.step()
        replica.scheduler.step()
        replica.steps_done += 1


def save(replica: Replica, place: Path) -> Contents:
    contents = copy_state(replica, POSITION, {"data_seed": 5}, {}).contents()
    write_checkpoint(place, contents)
    return contents


def saved(folder: Path, step: int = 3) -> Path:
    replica = make()
    take_steps(replica, step)
    save(replica, folder / f"step_{step:06}")
    return folder / f"step_{step:06}"


def state_of(replica: Replica) -> dict[str, Any]:
    """Everything, as bytes."""
    model = replica.model
    assert isinstance(model, Stateful)
    contents = copy_state(replica, Position(), {}, {}).contents()
    generator = model.generator.get_state().numpy().tobytes()
    return {
        "json": contents.state,
        "tensors": {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in contents.tensors.items()},
        "plain": (model.calls, list(model.seen), model.empty.numpy().tobytes(), generator),
    }


def test_restored_replica_continues_identically(tmp_path: Path) -> None:
    replica = make()
    take_steps(replica, 3)
    save(replica, tmp_path / "step_000003")
    at_save = state_of(replica)
    other = make(seed=99)
    contents = parse(read_files(tmp_path / "step_000003"))
    restore_state(other, contents, {})
    assert state_of(other) == at_save
    assert Position(**contents.state["position"]) == POSITION
    assert contents.state["data_seed"] == 5
    take_steps(other, 3)
    restored_run = state_of(other)
    restore_state(replica, parse(read_files(tmp_path / "step_000003")), {})  # the generators are this process's own
    take_steps(replica, 3)
    assert state_of(replica) == restored_run


def test_weights_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    replica = make()
    save(replica, tmp_path / "step_000000")
    weights = load_file(tmp_path / "step_000000" / MODEL_FILE)
    assert weights["body.0.weight"].numpy().tobytes() == replica.model.body[0].weight.detach().numpy().tobytes()  # type: ignore[union-attr,index]
    assert weights.keys() == {*dict(replica.model.named_parameters()), *dict(replica.model.named_buffers())} - {"waves"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_a_digit(path: Path) -> None:
    """Change a digit of the position in the data, which leaves valid JSON."""
    content = path.read_bytes()
    changed = content.replace(b'"num_batches": 3', b'"num_batches": 2')
    path.write_bytes(changed if changed != content else content + b"\0")


def not_json(path: Path) -> None:
    path.write_bytes(b"[1, 2]\n")


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE])
@pytest.mark.parametrize("damage", [truncate, flip_one_bit, flip_a_digit, not_json, Path.unlink])
def test_parse_rejects_damaged_file(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    place = saved(tmp_path)
    parse(read_files(place))
    damage(place / name)
    with pytest.raises(CheckpointError, match=name):
        parse(read_files(place))


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_parse_executes_no_code(tmp_path: Path) -> None:
    place, mark = tmp_path / "step_000001", tmp_path / "mark"
    replica = make()
    contents = copy_state(replica, POSITION, {}, {}).contents()
    contents.optimizer["others"] = [Bomb(str(mark))]
    write_checkpoint(place, contents)  # with digests that are right
    with pytest.raises(CheckpointError, match=r"cannot load optimizer\.pt: it contains .*mkdir") as caught:
        parse(read_files(place))
    assert caught.value.fields["classes"] == [f"{os.mkdir.__module__}.mkdir"]
    assert not mark.exists()
    with (place / OPTIMIZER_FILE).open("rb") as file:
        torch.load(file, weights_only=False)
    assert mark.exists(), "the bomb was no bomb"
    assert pickle.dumps(Bomb("x"))


@pytest.mark.parametrize("header", [b"", b"\xff" * 20, b"\x09\0\0\0\0\0\0\0{'a': 1}"])
def test_parse_rejects_foreign_file(header: bytes, tmp_path: Path) -> None:
    place = saved(tmp_path)
    files = read_files(place) | {MODEL_FILE: header}
    state = json.loads(files[STATE_FILE])
    state["files"][MODEL_FILE] = xxhash.xxh3_128_hexdigest(header)
    del state["digest"]
    state["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())
    with pytest.raises(CheckpointError, match=r"cannot load model\.safetensors: "):
        parse(files | {STATE_FILE: json.dumps(state).encode()})


def another_model() -> Replica:
    replica = make()
    model = tiny_model(7)
    return Replica(model, replica.criterion, torch.optim.SGD(model.parameters(), lr=0.1))


def another_optimizer() -> Replica:
    replica = make()
    optimizer = torch.optim.SGD(replica.model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return Replica(replica.model, replica.criterion, optimizer, scheduler)


def other_groups() -> Replica:
    replica = make()
    parameters = list(replica.model.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    return Replica(replica.model, replica.criterion, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 20))


@pytest.mark.parametrize("build", [another_model, another_optimizer, other_groups])
def test_restore_rejects_other_replica(build: Callable[[], Replica], tmp_path: Path) -> None:
    contents = parse(read_files(saved(tmp_path)))
    with pytest.raises(CheckpointError):
        restore_state(build(), contents, {})


def adamw(contents: Contents) -> dict[str, Any]:
    return contents.optimizer["optimizers"][0]


@pytest.mark.parametrize(
    ("change", "stage", "tensor"),
    [
        (lambda contents: adamw(contents)["state"].clear(), "optimizer", "body.0.weight.step"),
        (lambda contents: adamw(contents)["groups"][0].update(lr=0.5), "optimizer", "group0.lr"),
        (lambda contents: contents.optimizer["others"][0].update(last_epoch=0), "optimizer", "OneCycleLR.last_epoch"),
        (lambda contents: contents.tensors["body.1.running_var"].add_(1), "buffers", "body.1.running_var"),
        (lambda contents: contents.tensors["tied.bias"].neg_(), "weights", "tied.bias"),
        (lambda contents: contents.state["rng"]["python"][1].__setitem__(0, 1), "rng", "python"),
        (lambda contents: contents.state["rng"]["numpy"].__setitem__(2, 7), "rng", "numpy"),
    ],
)
def test_restore_names_the_tensor_that_differs(
    change: Callable[[Contents], Any], stage: str, tensor: str, tmp_path: Path
) -> None:
    contents = parse(read_files(saved(tmp_path)))
    change(contents)
    with pytest.raises(CheckpointError) as raised:
        restore_state(make(), contents, {})
    assert raised.value.code == "digest-differs"
    assert raised.value.fields == {"stage": stage, "tensor": tensor}
    assert str(raised.value) == f"{tensor} in {stage} differs from its saved digest after the restore"


def test_full_disk_keeps_old_checkpoint(tmp_path: Path) -> None:
    replica = make()
    place = tmp_path / "step_000000"
    save(replica, place)
    before = read_files(place)
    process = os.fork()
    if not process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        try:
            save(replica, place)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert read_files(place) == before
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_prune_keeps_newest(kept: int, tmp_path: Path) -> None:
    for step in (2, 10, 1_000_000, 999_999):
        (tmp_path / f"step_{step:06}").mkdir()
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, kept)
    steps = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
    assert steps == [1_000_000, 999_999, 10, 2][:kept]
    assert (tmp_path / "notes").is_dir()


def test_prune_removes_one_part(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        for part in ("replica_0", "replica_1"):
            (tmp_path / f"step_{step:06}" / part).mkdir(parents=True)
    prune_checkpoints(tmp_path, 1, "replica_0")
    assert len(list_checkpoints(tmp_path)) == 3
    prune_checkpoints(tmp_path, 1, "replica_1")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000003"]


def test_remove_leftovers_of_killed_process(tmp_path: Path) -> None:
    place = saved(tmp_path)
    shutil.copytree(place, tmp_path / ".step_000004.17.tmp")
    shutil.copytree(place, tmp_path / "step_000005" / ".replica_0.17.tmp")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005", place.name]
    remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    parse(read_files(place))


def test_saver_writes_in_background_and_survives_errors(tmp_path: Path) -> None:
    replica = make()
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, keep=1)
    at_save = []
    for _ in range(3):
        take_steps(replica, 1)
        saver.save(copy_state(replica, POSITION, {}, {}))
        at_save.append(state_of(replica))
        take_steps(replica, 1)  # while the thread writes
    saver.wait()
    assert [path.name for path in list_checkpoints(folder)] == ["step_000005", "step_000003"], "one more meanwhile"
    saver.prune()
    assert [path.name for path in list_checkpoints(folder)] == ["step_000005"]
    other = make(seed=7)
    restore_state(other, parse(read_files(folder / "step_000005")), {})
    assert state_of(other) == at_save[-1]
    assert not saver.failures
    shutil.rmtree(folder)
    folder.write_text("in the way")
    saver.save(copy_state(replica, POSITION, {}, {}))
    saver.wait()
    assert len(saver.failures) == 1
    assert saver.failures[0].startswith("cannot write the checkpoint at step 6: ")


class Helper:
    pass


def test_saver_reports_unloadable_optimizer_state(tmp_path: Path) -> None:
    replica = make()
    take_steps(replica, 1)
    replica.optimizer.state[next(iter(replica.model.parameters()))]["helper"] = Helper()
    saver = Saver(tmp_path / "checkpoints", keep=1)
    saver.save(copy_state(replica, POSITION, {}, {}))
    saver.wait()
    assert "cannot load optimizer.pt" in saver.failures[0]


def test_state_json_has_documented_fields(tmp_path: Path) -> None:
    state = json.loads((saved(tmp_path) / STATE_FILE).read_text())
    assert state["step"] == 3
    assert state.keys() >= {"schema", "step", "position", "rng", "digests", "files", "digest"}
    assert state["digests"].keys() == {"weights", "buffers", "optimizer", "rng"}
