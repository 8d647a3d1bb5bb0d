# SPDX-License-Identifier: Apache-2.0
"""A checkpoint gets its name when it is complete, and what killed processes have left is no obstacle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moetion.persist import tracker
from megatron_moetion.persist.tracker import Draft, checkpoint_folder, latest_iteration


def write(root: Path, iteration: int, content: str) -> Path:
    with Draft(root, iteration) as draft:
        (draft.folder / "content").write_text(content)
        draft.publish()
    return checkpoint_folder(str(root), iteration)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_complete_draft_is_the_newest_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "new"
    write(root, 3, "a")
    folder = write(root, 5, "b")
    assert (folder / "content").read_text() == "b"
    assert latest_iteration(str(root)) == 5
    assert names(root) == ["iter_0000003", "iter_0000005", tracker.TRACKER]


def test_a_draft_that_is_not_published_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, 3, "a")
    with Draft(tmp_path, 3) as draft:
        (draft.folder / "content").write_text("half")
    assert names(tmp_path) == ["iter_0000003", tracker.TRACKER]
    assert (tmp_path / "iter_0000003" / "content").read_text() == "a"


def test_a_checkpoint_is_replaced_by_one_of_its_name(tmp_path: Path) -> None:
    write(tmp_path, 3, "a")
    assert (write(tmp_path, 3, "b") / "content").read_text() == "b"
    assert names(tmp_path) == ["iter_0000003", tracker.TRACKER]


@pytest.mark.parametrize("dies_at", ["rename", "make_durable", "write_tracker"])
def test_one_that_was_about_to_be_replaced_comes_back(tmp_path: Path, dies_at: str) -> None:
    """The process ends behind the first, or the second, change of names, or before the tracker file moves."""
    write(tmp_path, 3, "a")
    program = (
        "import os, sys; from pathlib import Path; from megatron_moetion.persist import tracker\n"
        "def die(*_): os.kill(os.getpid(), 9)\n"
        "with tracker.Draft(Path(sys.argv[1]), 3) as draft:\n"
        "    (draft.folder / 'content').write_text('b')\n"
        "    if sys.argv[2] == 'rename':\n"
        "        rename = Path.rename\n"
        "        Path.rename = lambda a, b: die() if a == draft.folder else rename(a, b)\n"
        "    else:\n"
        "        setattr(tracker, sys.argv[2], die)\n"
        "    draft.publish()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path), dies_at], env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    assert latest_iteration(str(tmp_path)) == 3
    with Draft(tmp_path, 4):
        assert (tmp_path / "iter_0000003" / "content").read_text() == ("a" if dies_at == "rename" else "b")
    assert names(tmp_path) == ["iter_0000003", tracker.TRACKER]


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    (tmp_path / ".iter_0000002.12345678.draft").mkdir()
    with Draft(tmp_path, 3) as mine, Draft(tmp_path, 3) as other:
        assert mine.folder != other.folder
        assert {mine.folder.name, other.folder.name} == set(names(tmp_path))
