"""Loading the config: the command line, precedence and overrides."""

from pathlib import Path

import pytest

from dreplica.config.load import load_config, world_timeout
from dreplica.config.schema import RunConfig
from dreplica.errors import UsageError
from tests.config.loading import load, message_of, refusal

INVALID_ARGUMENTS = {
    "no value": (["--optim.lr"], "missing-value", "--optim.lr: a value is required. Write --optim.lr VALUE."),
    "option as a value": (["--optim.lr", "--train.epochs=1"], "missing-value", "--optim.lr: a value is required"),
    "stray word": (["train"], "invalid-value", "command line: expected --section.key VALUE, got 'train'. See --help."),
    "one dash": (["-x", "3"], "invalid-value", "got '-x'"),
    "nothing after the dashes": (["--"], "invalid-value", "got '--'"),
    "given twice": (["--optim.lr=1", "--optim.lr", "2"], "repeated-option", "--optim.lr: given twice, as '1' and '2'"),
    "given alone and in its section": (
        ["--train.epochs=1", "--train={epochs: 3}"],
        "repeated-option",
        "command line: train.epochs: given twice, as 3 and 1. Keep one.",
    ),
    "given alone and in its section, within an override": (
        ["--overrides.1.optim.lr=2", "--overrides.1={optim: {lr: 1}}"],
        "repeated-option",
        "command line: overrides.1.optim.lr: given twice, as 1 and 2",
    ),
    "given twice for one replica": (
        ["--overrides.1.optim.lr=2", "--overrides.01.optim.lr=1"],
        "repeated-option",
        "optim.lr: given twice, as 2 and 1",
    ),
    "key of a section that is a number": (
        ["--train.epochs=1", "--train=3"],
        "repeated-option",
        "command line: --train.epochs: conflicts with 3, given for all of train",
    ),
    "single dot": (["--.", "1"], "invalid-value", "got '--.'"),
    "key without the section's name": (["--.epochs=1"], "invalid-value", "got '--.epochs=1'"),
    "two dots": (["--train..epochs=1"], "invalid-value", "got '--train..epochs=1'"),
    "replica id of 5000 digits": ([f"--overrides.{'9' * 5000}.optim.lr=1"], "invalid-value", "expected an integer"),
    "--config twice": (["--config=other.yaml"], "repeated-option", "--config: given twice"),
    "unknown key": (["--optim.Lr=1"], "unknown-key", "optim.Lr: SGD has no argument 'Lr'. Did you mean 'lr'?"),
    "unknown section": (["--optin.lr=1"], "unknown-key", "command line: optin: unknown key. Did you mean 'optim'?"),
    "no section": (["--epochs=1"], "unknown-key", "command line: epochs: unknown key. Did you mean train.epochs?"),
    "dash in a key": (
        ["--train.max-steps=1"],
        "unknown-key",
        "train.max-steps: unknown key. Did you mean 'max_steps'?",
    ),
    "not YAML": (["--seed.model=[1,"], "invalid-yaml", "--seed.model: line 1, column 4: invalid YAML"),
    "integer of 5000 digits": (["--train.epochs=" + "9" * 5000], "invalid-yaml", "--train.epochs: invalid YAML"),
    "negative number": (["--optim.lr", "-1e-3"], "invalid-value", "optim.lr: expected a value >= 0, got -0.001."),
    "replica id that is no number": (
        ["--overrides.².optim.lr=1"],
        "invalid-value",
        "command line: overrides.²: expected",
    ),
    "missing replica": (
        ["--overrides.2.optim.lr=1"],
        "unknown-replica",
        "command line: overrides.2: expected a replica",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "part"), INVALID_ARGUMENTS.values(), ids=INVALID_ARGUMENTS.keys())
def test_load_refuses_argument(tmp_path: Path, arguments: list[str], code: str, part: str) -> None:
    error = refusal(tmp_path, "", *arguments)
    message = message_of(error, tmp_path)
    assert error.code == code
    assert part in message
    assert message.startswith("command line: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "code", "part"),
    [
        (lambda path: None, "unknown-config", "Correct the path, or use one of: cifar10, digits, "),
        (lambda path: path.mkdir(), "unreadable-file", "cannot be read (Is a directory). Name a YAML file"),
        (lambda path: path.write_bytes(b"\x80\x04\x95\xff\xfe"), "unreadable-file", "is not text"),
        (lambda path: path.write_bytes(b"train:\n  \x00\x01"), "invalid-yaml", "line 2, column 3: invalid YAML"),
    ],
    ids=["missing", "folder", "binary", "binary but UTF-8"],
)
def test_load_refuses_config_that_is_no_yaml_file(tmp_path: Path, make: object, code: str, part: str) -> None:
    path = tmp_path / "job.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(UsageError) as caught:
        load_config([f"--config={path}"], 2)
    message = str(caught.value)
    assert caught.value.code == code
    assert part in message
    assert "job.yaml" in message
    assert "\n" not in message


@pytest.mark.parametrize("spelling", ["1e-3", "0.001", "1E-3", ".001"])
def test_number_is_equal_in_file_and_on_command_line(tmp_path: Path, spelling: str) -> None:
    assert load(tmp_path, f"optim: {{lr: {spelling}}}").optim.lr == 0.001
    assert load(tmp_path, "", f"--optim.lr={spelling}").optim.lr == 0.001
    assert load(tmp_path, "", "--optim.lr", spelling).optim.lr == 0.001


def test_mode_off_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, "determinism: {mode: off}").determinism.mode == "off"
    assert load(tmp_path, "", "--determinism.mode", "off").determinism.mode == "off"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "train:\noptim:\noverrides:\n", "train: {}"])
def test_empty_file_or_section_means_defaults(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    assert config.run.name == "job"
    assert config.model_copy(update={"run": RunConfig().run}) == RunConfig()


def test_command_line_overrides_file(tmp_path: Path) -> None:
    text = "optim: {name: SGD, lr: 0.5, momentum: 0.9}\nschedule: {name: StepLR, step_size: 3}"
    config = load(tmp_path, text, "--optim.lr=0.25", "--schedule={}", "--seed.model=[3, 4]")
    assert config.optim.lr == 0.25
    assert config.optim.arguments["momentum"] == 0.9
    assert config.schedule.name is None
    assert config.seed.model == [3, 4]


def test_key_overrides_whole_section_on_command_line(tmp_path: Path) -> None:
    for arguments in (["--optim.lr=1", "--optim={name: Adam}"], ["--optim={name: Adam}", "--optim.lr=1"]):
        config = load(tmp_path, "optim: {lr: 0.5}", *arguments)
        assert (config.optim.name, config.optim.lr) == ("Adam", 1)


def test_renamed_optimizer_drops_old_arguments(tmp_path: Path) -> None:
    config = load(tmp_path, "optim: {name: SGD, lr: 0.5, momentum: 0.9}", "--optim.name=Adam")
    assert config.optim.arguments == {"lr": 0.5}
    for arguments in (
        ["--optim.weight_decay=0.1", "--optim.name=Adam"],
        ["--optim.name=Adam", "--optim.weight_decay=0.1"],
    ):
        assert load(tmp_path, "optim: {lr: 0.5}", *arguments).optim.arguments == {"lr": 0.5, "weight_decay": 0.1}


def test_override_changes_only_its_replica(tmp_path: Path) -> None:
    text = "optim: {lr: 0.5, momentum: 0.9}\noverrides: {1: {optim: {lr: 0.25}}}"
    config = load(tmp_path, text)
    assert config.for_replica(0).optim.lr == 0.5
    assert config.for_replica(1).optim.lr == 0.25
    assert config.for_replica(1).optim.arguments["momentum"] == 0.9
    assert load(tmp_path, "", "--overrides.1.optim.lr=0.25").for_replica(1).optim.lr == 0.25


@pytest.mark.parametrize(
    "nothing",
    ["{1: {train: null}}", "{1: {data: null}}", "{1: {optim: , seed: }}", "{1: {train: {}}}", "{1: null}"],
)
def test_empty_override_declares_nothing(tmp_path: Path, nothing: str) -> None:
    text = "train: {epochs: 3}\ndata: {batch_size: 7}\noptim: {lr: 0.5}"
    config = load(tmp_path, text, f"--overrides={nothing}")
    assert config.for_replica(1).model_dump(exclude={"overrides"}) == config.model_dump(exclude={"overrides"})
    assert config.overrides == {}
    assert config.for_replica(1).train.epochs == 3


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("{}", [], 300.0),
        ("world: {timeout: 7}", [], 7.0),
        ("world: {timeout: 7}", ["--world.timeout=8"], 8.0),
        ("world: {timeout: 7}", ["--world", "{timeout: 9}"], 9.0),
        ("world: {timeout: 7}", ["--world={device: cpu}"], 300.0),
        ("model: {factory: 'tests.no_such_module:f'}\nworld: {timeout: 7}", [], 7.0),  # nothing is imported
        ("world: {timeout: soon}", [], 300.0),  # and what is invalid is reported elsewhere
        ("world: {timeout: -1}", [], 300.0),
        ("world: [1]", [], 300.0),
        ("[1]", [], 300.0),
        ("world: {timeout: 7}", ["--world.timeout"], 300.0),
    ],
)
def test_world_timeout_reads_only_its_key(tmp_path: Path, text: str, arguments: list[str], expected: float) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert world_timeout(["--config", str(path), *arguments]) == expected


@pytest.mark.parametrize("arguments", [["--config", ""], ["--config="]])
def test_load_refuses_empty_path(arguments: list[str]) -> None:
    """As torchrun passes them, which checks no settings."""
    with pytest.raises(UsageError) as caught:
        load_config(arguments, 1)
    assert str(caught.value) == "command line: --config: the path is empty. Name a YAML file."
    assert world_timeout(arguments) == 300.0
