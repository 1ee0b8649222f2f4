"""Where configs and cause pages are found, in a checkout and in an installed package."""

import shutil
from pathlib import Path

import pytest

from dreplica.config import paths
from dreplica.config.load import DEFAULT_CONFIG, load_config
from dreplica.errors import UsageError


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("digits", "digits.yaml"),
        ("cifar10.yaml", "cifar10.yaml"),
        ("configs/cifar10.yaml", "cifar10.yaml"),
        ("./configs/finetune_folder.yaml", "finetune_folder.yaml"),
        ("cases/clean", "cases/clean.yaml"),
        ("configs/cases/clean.yaml", "cases/clean.yaml"),
    ],
)
def test_find_config_finds_packaged_config(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.find_config(name) == paths.CONFIGS_FOLDER / file


def test_find_config_prefers_file_in_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("configs/cifar10.yaml")
    file.parent.mkdir()
    file.touch()
    assert paths.find_config("configs/cifar10.yaml") == file


def test_find_config_skips_folder_of_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    assert paths.find_config("digits") == DEFAULT_CONFIG


@pytest.mark.parametrize("name", ["nothing", "/configs/digits.yaml", "../digits", "configs/nothing.yaml"])
def test_find_config_returns_none_for_unknown_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.find_config(name) is None


def test_load_config_names_run_after_packaged_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["--config", "cases/clean", "--run.name=null"], 2)
    assert config.run.name == "clean"


def test_load_config_suggests_packaged_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"^--config: no file 'configs/digit.yaml' .* Did you mean 'digits'\?$"
    ) as caught:
        load_config(["--config=configs/digit.yaml"], 2)
    assert caught.value.code == "unknown-config"
    assert "cases/clean" in caught.value.fields["expected"]


def test_shipped_path_prefers_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has folders and files in the package, and a checkout has them next to it."""
    package = tmp_path / "dreplica"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(paths, "PACKAGE_ROOT", package)
    monkeypatch.setattr(paths, "IMPORT_ROOT", tmp_path)
    assert paths.shipped_path("configs", "configs") == package / "configs"
    shutil.rmtree(package / "configs")
    assert paths.shipped_path("configs", "configs") == tmp_path / "configs"
    assert paths.shipped_path("causes", "docs/causes") == tmp_path / "docs" / "causes"
    (package / "two_runs_differ.md").write_text("# My two runs differ")
    assert paths.shipped_path("two_runs_differ.md", "docs/two_runs_differ.md") == package / "two_runs_differ.md"
