# SPDX-License-Identifier: Apache-2.0
"""Pages lead where they say, and figures on them are those that were measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import costs
import pytest

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.mcore.argument_checks import Machine
from megatron_moetion.mcore.arguments import parse_arguments
from megatron_moetion.store.node import NodeFolder, store_folder, write_pid

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"), costs.RESULTS / "README.md"]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of each link that does not leave the repository."""
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{path}#{anchor}")
    assert dead == []


def test_readme_says_who_reads_what() -> None:
    shown = {(ROOT / path).resolve() for path, _ in links(ROOT / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) - shown == set()


def test_what_it_costs_is_what_was_measured() -> None:
    page = costs.PAGE.read_text()
    assert page == costs.written(page), "run scripts/costs.py"


def test_a_figure_that_is_not_there_is_not_made_up() -> None:
    assert costs.ratio({}, "middle", "ends", 0.0) == "not measured"
    with pytest.raises(AssertionError, match="seconds was not measured"):
        costs.value({"seconds": None}, "seconds")


# -- commands of the quickstart that take no run to try -------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """The indented blocks of a page, each as one text, continued lines joined."""
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE)
    return ["\n".join(line.strip() for line in block.replace("\\\n", "").splitlines()) for block in blocks]


def test_the_first_run_of_the_quickstart_has_flags_that_fit_each_other() -> None:
    (run,) = [text for text in commands(QUICKSTART) if "pretrain_gpt_moe.py" in text]
    launcher, _, flags = run.splitlines()[-1].partition("pretrain_gpt_moe.py")
    (ranks,) = re.findall(r"--nproc-per-node (\d+)", launcher)
    (run_id,) = re.findall(r"--rdzv-id (\S+)", launcher)
    for has_gpu in (False, True):
        args = parse_arguments(flags.split(), Machine(world_size=int(ranks), has_gpu=has_gpu))
        assert int(ranks) // args.moetion_ranks_per_node == 2
    assert f"moetion status {run_id}" in QUICKSTART.read_text()


def test_the_quickstart_kills_the_processes_of_the_node_that_it_deletes(tmp_path: Path) -> None:
    (lose,) = [text for text in commands(QUICKSTART) if "kill -9" in text]
    enter, kill = lose.splitlines()
    node = tmp_path / "node1"
    node.mkdir()
    folder = NodeFolder(path=node, key="k", position=0, num_ranks=1, clock=SystemClock())
    with subprocess.Popen(["sleep", "60"]) as process:
        with mock.patch("os.getpid", return_value=process.pid):
            write_pid(folder, 2, 0)
        subprocess.run(["bash", "-c", kill], cwd=tmp_path, check=True)
        assert process.wait(10) == -signal.SIGKILL
    assert not node.exists()
    assert enter == f"cd {store_folder(MoetionConfig())}/first-run".replace(str(os.getuid()), "$(id -u)")
