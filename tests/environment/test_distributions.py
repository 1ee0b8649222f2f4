"""Installed distributions, broken ones included."""

import json
from pathlib import Path

import pytest

from dreplica.environment.distributions import installed_distributions, runs_kernels


def _install(folder: Path, name: str, files: dict[str, str | bytes]) -> None:
    (folder / name).mkdir(parents=True)
    for file, text in files.items():
        (folder / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_distributions_of_every_kind_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _install(first, "Some.Package-1.0.dist-info", {"METADATA": "Name: Some.Package\nVersion: 1.0\n\nVersion: 9"})
    _install(second, "some_package-2.0.dist-info", {"METADATA": "Name: some_package\nVersion: 2.0\n"})
    _install(first, "old.egg-info", {"PKG-INFO": "Metadata-Version: 1.0\nName: old\nVersion: 0.1\n"})
    in_git = {"url": "https://a:b@c/d", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    git = {"METADATA": "Name: from-git\nVersion: 1.0\n", "direct_url.json": json.dumps(in_git)}
    _install(first, "from_git-1.0.dist-info", git)
    editable = {"url": "file:///x", "dir_info": {"editable": True}}
    _install(
        first,
        "mine-1.0.dist-info",
        {"METADATA": "Name: mine\nVersion: 1.0\n", "direct_url.json": json.dumps(editable)},
    )
    monkeypatch.setattr("sys.path", [str(first), str(second)])
    assert installed_distributions() == {
        "from-git": "1.0 (commit 0123456789ab)",
        "mine": "1.0 (editable)",
        "old": "0.1",
        "some-package": "1.0",
    }


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({}, "absent"),
        ({"METADATA": ""}, "absent"),
        ({"METADATA": "Version: 1.0"}, "absent"),
        ({"METADATA": "Name: broken"}, None),
        ({"METADATA": "Name: broken\nVersion:\n"}, None),
        ({"METADATA": b"Name: broken\nVersion: 1\nAuthor: \xff\xfe\n"}, "absent"),
        ({"METADATA": "Name: broken\nVersion: 1\n", "direct_url.json": "{"}, "absent"),
        ({"METADATA": "Name: broken\nVersion: 1\n", "direct_url.json": "[]"}, "1"),
        ({"METADATA": "Name: broken\nVersion: 1\n", "direct_url.json": '{"vcs_info": null}'}, "1"),
    ],
)
def test_broken_distribution_is_no_error(
    files: dict[str, str | bytes], version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "broken-1.dist-info", files)
    _install(tmp_path, "~roken-1.dist-info", {})
    _install(tmp_path, "sound-1.dist-info", {"METADATA": "Name: sound\nVersion: 1\n"})
    monkeypatch.setattr("sys.path", [str(tmp_path), "", str(tmp_path / "missing"), str(tmp_path / "x.zip")])
    found = installed_distributions()
    assert found.pop("sound") == "1"
    assert found == ({} if version == "absent" else {"broken": version})


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("distributions.torch", True),
        ("distributions.nvidia-cublas-cu12", True),
        ("distributions.scipy", True),
        ("distributions.pytest", False),
        ("packages.torch", False),
        ("torch", False),
    ],
)
def test_runs_kernels_knows_libraries_of_kernels(field: str, expected: bool) -> None:
    assert runs_kernels(field) == expected
