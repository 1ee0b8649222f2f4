"""Values of single numbers as evidence."""

import torch

from dreplica.agreement.hasher import Hasher
from dreplica.agreement.values import describe_forms, describe_values, drawn_on_some, read_forms, read_values
from dreplica.state.stages import Entry
from tests.agreement.own_loop import train_on_rank
from tests.harness import run_replicas

ENTRIES: list[Entry] = [
    ("lr", b"0.1"),
    ("scale", torch.tensor(65536.0)),
    ("weight", torch.ones(2, 2)),
    ("state", bytes(range(50))),
    ("long", b"x" * 100),
    ("missing", None),
]


def test_read_values_reads_numbers_and_short_texts() -> None:
    stage = Hasher().start({"s": ENTRIES}).stages["s"]
    names = [name for name, _ in ENTRIES]
    assert read_values(Hasher(), stage, ENTRIES, names) == {"lr": "0.1", "scale": "65536.0", "missing": "missing"}
    assert read_values(Hasher(), stage, ENTRIES, ["scale"]) == {"scale": "65536.0"}


def test_read_values_omits_what_has_changed_since() -> None:
    stage = Hasher().start({"s": ENTRIES}).stages["s"]
    now = [("lr", b"0.2"), ("scale", torch.tensor(65536.0)), ("new", b"1")]
    assert read_values(Hasher(), stage, now, ["lr", "scale", "new"]) == {"scale": "65536.0"}


def test_describe_values_groups_replicas() -> None:
    rows = [{"lr": "0.1", "wd": "0"}, {"lr": "0.2", "wd": "0"}, {"lr": "0.1"}]
    (line,) = describe_values(["lr", "wd"], rows)
    assert line.text == "values: lr 0.1 on replicas 0, 2, 0.2 on replica 1"
    assert line.data["values"] == {"lr": ["0.1", "0.2", "0.1"]}
    assert describe_values(["wd"], rows) == []


def test_describe_values_groups_equal_pairs() -> None:
    names = [f"{name}.step" for name in "abc"]
    rows = [dict.fromkeys([*names, "lr"], "3.0"), {**dict.fromkeys([*names, "lr"], "2.0"), "c.step": "1.0"}]
    (line,) = describe_values([*names, "lr"], rows)
    assert line.text == (
        "values: *.step (2) 3.0 on replica 0, 2.0 on replica 1; c.step 3.0 on replica 0, 1.0 on replica 1; "
        "lr 3.0 on replica 0, 2.0 on replica 1"
    )
    assert line.data["values"]["b.step"] == ["3.0", "2.0"]


def test_read_values_reads_the_first_ones() -> None:
    """Tensors do not count, so that a scheduler's values are read behind those of any number of parameters."""
    entries: list[Entry] = [(f"{n}.exp_avg", torch.ones(2)) for n in range(400)] + [(f"v{n}", b"1") for n in range(20)]
    stage = Hasher().start({"s": entries}).stages["s"]
    assert list(read_values(Hasher(), stage, entries, [name for name, _ in entries])) == [f"v{n}" for n in range(12)]


def test_drawn_on_some_names_replicas() -> None:
    (line,) = drawn_on_some(["python", "torch.cpu"], [["python"], [], ["python"]])
    assert line.data == {"generator": "python", "drawn": [1], "not_drawn": [0, 2]}


def test_divergence_has_values_with_and_without_lag() -> None:
    for lag in (0, 1):
        texts = run_replicas(train_on_rank, 2, "lr", {"lag": lag})
        assert "evidence: values: group0.lr 0.1 on replica 0, 0.5 on replica 1\n" in texts[0]
        assert "remedy: set the same value of group0.lr on every replica" in texts[0]


def test_describe_forms_names_dtypes_that_differ() -> None:
    names = ["weight", "scale"]
    rows = [read_forms(ENTRIES, names), read_forms([("weight", torch.ones(2, 2).bfloat16())], names)]
    (line,) = describe_forms(names, rows)
    form = "of shape (2, 2) on replica"
    assert line.text == f"tensors of different form: weight is float32 {form} 0, bfloat16 {form} 1"
    assert describe_forms(names, [rows[0], rows[0]]) == describe_forms(names, [rows[0], {}]) == []
