"""Reading YAML 1.2."""

from pathlib import Path

import pytest

from dreplica.config.yaml import load_yaml, read_yaml
from dreplica.errors import UsageError


def test_read_yaml_follows_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("[1e-3, 5E2, -.5, 010, 08, 0x1F, 0o17, off, no, yes, ~, null, true, 1_000, 1:30, .inf, -1]")
    with pytest.raises(UsageError, match="expected sections"):
        read_yaml(path)
    path.write_text("values: " + path.read_text())
    expected = [0.001, 500.0, -0.5, 10, 8, 31, 15, "off", "no", "yes", None, None, True, "1_000", "1:30", float("inf")]
    values = read_yaml(path)["values"]
    assert values == [*expected, -1]
    assert [type(value) for value in values] == [type(value) for value in [*expected, -1]]


def test_load_yaml_error_names_source_and_position() -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml("a: 1\na: 2", "some.yaml")
    assert str(caught.value) == "some.yaml: line 2, column 1: invalid YAML: duplicate key 'a'."
    assert (caught.value.code, caught.value.fields["source"]) == ("invalid-yaml", "some.yaml")


def test_load_yaml_error_names_end_of_file() -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml("a: [1", "some.yaml")
    assert "stream end" not in str(caught.value)
    assert str(caught.value).endswith("but got end of file.")
