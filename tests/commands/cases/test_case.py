"""What the header of a case says, and that every case in configs/cases can be read and run."""

import re
from pathlib import Path

import pytest

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.commands.cases.case import CASES_FOLDER, find_cases, read_case
from dreplica.config.load import load_config
from dreplica.config.paths import PACKAGE_ROOT
from dreplica.errors import UsageError

CASES = find_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_config_loads_and_header_is_whole(case) -> None:
    config = load_config([f"--config={case.path}"], case.num_replicas)
    assert config.run.name == case.name
    header = case.path.read_text().partition("\nrun:")[0]
    for label in ("What", "Must be found", "Time", "Command"):
        assert f"# {label}: " in header
    entry = "train.py" if case.module == "dreplica.worker" else f"-m {case.module}"
    command = f"torchrun --standalone --nproc_per_node={case.num_replicas} {entry}"
    assert f"# Command: {command} --config configs/cases/{case.name}.yaml" in header


def test_every_cause_has_a_case() -> None:
    assert {case.expected["cause"] for case in CASES} == set(CAUSES)


def test_every_sample_is_used() -> None:
    folder = PACKAGE_ROOT / "commands" / "cases" / "samples"
    used = "".join(case.path.read_text() for case in CASES)
    for module in ("builds", "models", "data"):
        functions = re.findall(r"^def ([a-z]\w*)\(", (folder / f"{module}.py").read_text(), re.MULTILINE)
        assert functions
        for function in functions:
            assert f"dreplica.commands.cases.samples.{module}:{function}" in used, function


def test_header_fields(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(
        "# What: a case.\n"
        "# Expected: batch-differs step=3 suspects=[0, 2] operator=aten.mm.default tensor=null weights=unequal\n"
        "# Replicas: 3\n"
        "# Module: some.worker\n"
        "run: {name: some}\n"
        "# Replicas: 4\n"
    )
    case = read_case(path)
    assert case.name == "some"
    assert case.num_replicas == 3
    assert case.module == "some.worker"
    assert case.expected == {
        "cause": "batch-differs",
        "step": 3,
        "suspects": [0, 2],
        "operator": "aten.mm.default",
        "tensor": None,
        "weights": "unequal",
    }


def test_header_defaults(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("# Expected: none\n")
    case = read_case(path)
    assert (case.num_replicas, case.module, case.expected) == (2, "dreplica.worker", {"cause": "none"})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("# What: no expectation.\n", "header has no expected cause"),
        ("run: {}\n# Expected: none\n", "header has no expected cause"),
        ("# Expected: optimiser-not-bound\n", "Did you mean 'optimizer-not-bound'"),
        ("# Expected: none stp=0\n", "Did you mean 'step'"),
        ("# Expected: none step 0\n", "'step 0' is not of the form"),
        ("# Expected: none\n# Expected: none\n", "is in the header twice"),
        ("# Expected: none\n# Replicas: two\n", "'# Replicas: two' expected a positive number"),
        ("# Expected: none\n# Replicas: 0\n", "'# Replicas: 0' expected a positive number"),
    ],
)
def test_unusable_headers_are_named(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(header)
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        read_case(path)
    assert str(path) in str(raised.value)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no case 'deepcopied_optimiser'.*Did you mean 'deepcopied_optimizer'"):
        find_cases(["clean", "deepcopied_optimiser"])


def test_names_keep_their_order() -> None:
    assert [case.name for case in find_cases(["null_seed", "clean"])] == ["null_seed", "clean"]


def test_a_folder_without_cases_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no cases in"):
        find_cases([], tmp_path)


def test_all_cases_are_found() -> None:
    assert [case.path for case in CASES] == sorted(CASES_FOLDER.iterdir())
