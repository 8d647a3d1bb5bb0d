# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md says what tests have shown, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import compatibility
import pytest
from compatibility import GROUPS, PAGE, ROOT, Leg, Result, committed, merged, page, place_of, read_leg, unknown, written

FEATURE = "DistributedOptimizer, fp32"


def result(**more: Any) -> Result:
    return Result(**{"feature": FEATURE, "level": "recovery", "test": "tests/t.py::test", "outcome": "passed", **more})


def leg(*results: Result, version: str = "0.16.1", **more: str) -> Leg:
    return Leg(versions={"megatron-core": version, "gpu": "", **more}, results=results)


def row(*legs: Leg, feature: str = FEATURE) -> list[str]:
    (line,) = [line for line in page(legs).splitlines() if line.startswith(f"| {feature} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_cell_says_the_strongest_of_what_was_shown() -> None:
    old = leg(result(level="inventory", test="tests/t.py::inventory"), result(test="tests/t.py::recovery"))
    new = leg(result(level="inventory", test="tests/t.py::inventory"), version="0.19.2")
    assert row(old, new) == [
        FEATURE,
        "bitwise recovery tested on CPU",
        "inventory tested",
        "`tests/t.py::recovery`<br>`tests/t.py::inventory`",
    ]


def test_a_failure_is_shown_beside_what_passes() -> None:
    cells = row(leg(result(), result(test="tests/t.py::other[a]", outcome="failed")))
    assert cells[1] == "**failed** (recovery: `tests/t.py::other[a]`)<br>bitwise recovery tested on CPU"
    assert "`tests/t.py::other[a]`" in cells[2]


def test_a_refusal_and_a_note_come_with_their_messages() -> None:
    found = leg(result(level="refused", message="no | way:\n<x>"), result(level="note", message="slow", test="n"))
    assert row(found)[1] == "refused: no \\| way: &lt;x><br>note: slow"


def test_cases_of_one_test_are_named_once() -> None:
    found = leg(result(test="tests/t.py::test[a]"), result(test="tests/t.py::test[b]"))
    assert row(found)[2] == "`tests/t.py::test[a]`"


def test_of_messages_that_cases_of_one_test_give_the_first_is_shown() -> None:
    said = {"a": "2 wheels", "b": "3 wheels"}
    found = leg(*(result(level="refused", message=m, test=f"tests/t.py::test[{case}]") for case, m in said.items()))
    assert row(found)[1:] == ["refused: 2 wheels", "`tests/t.py::test[a]`"]


def test_features_stand_in_the_order_of_their_beginnings() -> None:
    names = ["Tensor and context parallelism", "Lion", "Tensor parallelism, two", "Muon", FEATURE, "MTP, apart"]
    lines = page([leg(*(result(feature=name) for name in names))]).splitlines()
    cells = [line.split(" | ")[0].strip("|# ") for line in lines if line.startswith(("## ", "| "))]
    found = [cell for cell in cells if cell in names or cell in GROUPS]
    assert found == [
        "Optimizers", FEATURE, "Muon", "Lion", "Models", "MTP, apart",
        "Parallelism", "Tensor parallelism, two", "Tensor and context parallelism",
    ]  # fmt: skip
    assert place_of("Warp drive") is None


def test_only_a_test_that_used_the_gpu_counts_as_tested_on_it() -> None:
    found = leg(result(on_gpu=True), gpu="NVIDIA H200")
    assert row(found)[1] == "tested on GPU"
    assert "| megatron-core 0.16.1, NVIDIA H200 |" in page([found])


def test_parts_of_the_suite_in_one_environment_share_a_column() -> None:
    legs = merged(
        [leg(result(test="b"), version="0.19.2"), leg(version="0.19.10"), leg(result(test="a"), version="0.19.2")]
    )
    assert [one.title for one in legs] == ["megatron-core 0.19.2", "megatron-core 0.19.10"]
    assert [r.test for r in legs[0].results] == ["b", "a"]
    with_te = leg(version="0.19.2", **{"transformer-engine": "2.20.2"})
    assert with_te.title == "megatron-core 0.19.2, Transformer Engine 2.20.2"
    assert len(merged([*legs, with_te])) == 3


def test_a_leg_survives_its_file() -> None:
    found = leg(result(message="said"))
    assert read_leg(written(found)).results == [result(message="said")]
    assert read_leg(written(found)).versions == found.versions


def test_features_and_levels_that_are_not_listed_are_named() -> None:
    wrong = unknown([result(feature="Warp drive"), result(level="maybe"), result()])
    assert wrong == ["feature 'Warp drive' of tests/t.py::test", "level 'maybe' of tests/t.py::test"]


def test_no_beginning_is_listed_twice() -> None:
    beginnings = [beginning for group in GROUPS.values() for beginning in group]
    assert len(beginnings) == len(set(beginnings))


# -- the hook -----------------------------------------------------------------------------------------------------

SUITE = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.proves("A", "recovery")
@pytest.mark.proves("B", "refused")
def test_passes(record_property):
    record_property("message", "because")

@pytest.mark.proves("A", "recovery")
def test_fails():
    assert False

@pytest.mark.proves("A", "recovery")
def test_breaks(broken):
    pass

@pytest.mark.proves("A", "recovery")
@pytest.mark.skip(reason="a part of the sample: what is skipped proves nothing")
def test_is_skipped():
    pass

@pytest.mark.proves("A", "recovery")
@pytest.mark.xfail(reason="a part of the sample: what is expected to fail proves nothing")
def test_is_expected_to_fail():
    assert False

def test_proves_nothing():
    pass
"""


def pytest_writes(file: Path, *args: str) -> Leg:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--compatibility", str(file), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert file.exists(), done.stdout + done.stderr
    return read_leg(file.read_text())


def test_the_hook_writes_what_passed_and_what_failed_and_nothing_of_the_rest(tmp_path: Path) -> None:
    for name, text in {
        "conftest.py": (ROOT / "tests" / "conftest.py").read_text(),
        "test_suite.py": SUITE,
        "pytest.ini": f"[pytest]\npythonpath = {ROOT / 'scripts'}\nmarkers = proves\n",
    }.items():
        (tmp_path / name).write_text(text)
    found = pytest_writes(tmp_path / "out" / "leg.json", str(tmp_path), "-c", str(tmp_path / "pytest.ini"))
    assert [(r.feature, r.level, r.test, r.outcome, r.message) for r in found.results] == [
        ("A", "recovery", "test_suite.py::test_breaks", "failed", ""),
        ("A", "recovery", "test_suite.py::test_fails", "failed", ""),
        ("A", "recovery", "test_suite.py::test_passes", "passed", "because"),
        ("B", "refused", "test_suite.py::test_passes", "passed", "because"),
    ]
    assert {"megatron-core", "torch", "python", "gpu"} <= found.versions.keys()


# -- what is committed --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Every test of this tree that has a mark."""
    file = tmp_path_factory.mktemp("collected") / "all.json"
    return list(pytest_writes(file, str(ROOT / "tests"), "--collect-only").results)


def test_marks_name_features_and_levels_that_are_listed(collected: list[Result]) -> None:
    assert len(collected) > 30
    assert unknown(collected) == []


def test_the_page_is_what_the_script_makes_of_the_results() -> None:
    assert PAGE.read_text() == page(committed()), "run scripts/compatibility.py"


def test_what_the_page_names_is_a_test_that_says_it_proves_that(collected: list[Result]) -> None:
    """Files that are left out here as a whole, because something is not installed, cannot be looked into."""
    there = {(r.feature, r.level, r.test) for r in collected}
    files = {r.test.partition("::")[0] for r in collected}
    claimed = [r for leg in committed() for r in leg.results if r.test.partition("::")[0] in files]
    assert claimed
    assert [r for r in claimed if (r.feature, r.level, r.test) not in there] == []
    assert [r.test for leg in committed() for r in leg.results if not (ROOT / r.test.partition("::")[0]).exists()] == []


def test_a_page_is_not_made_of_marks_that_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compatibility, "RESULTS", tmp_path)
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    (tmp_path / "a.json").write_text(written(leg(result(feature="Warp drive"))))
    assert compatibility.main() == 1
    assert "Warp drive" in capsys.readouterr().err
    (tmp_path / "a.json").write_text(written(leg(result())))
    assert compatibility.main() == 0
    assert FEATURE in (tmp_path / "page.md").read_text()
