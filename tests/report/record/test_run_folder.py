"""The folder of a run: never shared, always named."""

import threading
from pathlib import Path

import pytest

from dreplica.errors import UsageError
from dreplica.report.record.run_folder import create_run_folder


def test_second_run_of_a_name_gets_a_suffix(tmp_path: Path) -> None:
    root = str(tmp_path / "deep" / "runs")
    names = [create_run_folder(root, "digits").name for _ in range(3)]
    assert names == ["digits", "digits-2", "digits-3"]


def test_file_of_that_name_counts_as_taken(tmp_path: Path) -> None:
    (tmp_path / "digits").touch()
    assert create_run_folder(str(tmp_path), "digits").name == "digits-2"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("a b/c", "a_b_c"),
        ("../../etc", "etc"),
        ("..", "run"),
        ("", "run"),
        ("Größe_1.5e-3", "Größe_1.5e-3"),
        ("a\nb\tc", "a_b_c"),
        ("lr=0.1+wd", "lr=0.1+wd"),
    ],
)
def test_special_characters_stay_below_the_root(tmp_path: Path, name: str, folder: str) -> None:
    made = create_run_folder(str(tmp_path), name)
    assert made == tmp_path / folder
    assert made.is_dir()


def test_concurrent_runs_never_share_a_folder(tmp_path: Path) -> None:
    made: list[Path] = []
    barrier = threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        for _ in range(5):
            made.append(create_run_folder(str(tmp_path), "job"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == len(set(made)) == len(list(tmp_path.iterdir())) == 40


def test_unwritable_root_raises_usage_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for root, problem in (
        (str(file), "got the file"),
        (str(file / "below"), "Not a directory"),
        ("/proc/runs", "No such file"),
    ):
        with pytest.raises(UsageError) as caught:
            create_run_folder(root, "job")
        assert str(caught.value).startswith("run.root: ")
        assert root in str(caught.value)
        assert problem in str(caught.value)
        assert "--run.root" in str(caught.value)


def test_too_long_name_raises_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"File name too long.*--run\.name"):
        create_run_folder(str(tmp_path), "x" * 300)
