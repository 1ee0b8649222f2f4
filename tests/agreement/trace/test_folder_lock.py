"""A lock on a run folder excludes other processes until it is released."""

import os
from pathlib import Path

import pytest

from dreplica.agreement.trace.folder_lock import FolderLock


def is_taken_for_another_process(folder: Path) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(FolderLock(folder).taken)
    return bool(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.process
def test_lock_excludes_other_processes_until_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert not lock.taken
    assert is_taken_for_another_process(tmp_path)
    lock.release()
    lock.release()
    assert not is_taken_for_another_process(tmp_path)


@pytest.mark.process
def test_lock_ends_with_its_object(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    del lock
    assert not is_taken_for_another_process(tmp_path)
