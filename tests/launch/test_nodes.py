"""What `dreplica train` wants to know of a run that is spread over several machines."""

import pytest

from dreplica.commands.main import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=2"], "--node-rank: None will not do: expected 0 to 1"),
        (["--nodes=2", "--node-rank=2", "--head=a:1"], "--node-rank: 2 will not do: expected 0 to 1"),
        (["--nodes=2", "--node-rank=1"], "--head: None will not do: expected HOST:PORT"),
        (["--nodes=2", "--node-rank=1", "--head=a"], "--head: a will not do: expected HOST:PORT"),
    ],
)
def test_machines_that_cannot_meet(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")
    assert "For instance --nodes 2 --node-rank 0 --head node0:29500." in line
