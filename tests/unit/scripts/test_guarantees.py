# SPDX-License-Identifier: Apache-2.0
"""docs/guarantees.md names proofs that are there, and says of every promise what proves it or that nothing does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from megatron_moetion.config import MODES
from megatron_moetion.sim.checker import Checker

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "guarantees.md"
TEXT = PAGE.read_text()
PARTS = ("Assumes", "Does not cover", "Kept by", "Proved by")
NUM_PROMISES = 13
WORD = re.compile(r"`([^`]+)`")
CITED = re.compile(r"(tests/[\w/]+\.py)|`(test_\w+)`")
"""A file, or a test in the file that was named last."""
MODULE = re.compile(r"[\w/]+\.py")


def promises(text: str) -> dict[str, str]:
    """The sections of the promises, by their headings."""
    return dict(re.findall(r"^## (G\d+: .+)\n((?:(?!## ).*\n)*)", text, re.MULTILINE))


def part(section: str, name: str) -> str:
    """A part of a section: from its bold name to the next one."""
    found = re.search(rf"^\*\*{name}\*\*(.*?)(?=^\*\*(?:{'|'.join(PARTS)})\*\*|\Z)", section, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def proofs(section: str) -> dict[str, str]:
    """The proofs of a promise, by kind; several of one kind together."""
    found: dict[str, str] = {}
    for item in re.split(r"^- ", part(section, "Proved by"), flags=re.MULTILINE)[1:]:
        kind, _, text = item.partition(":")
        kind = " ".join(kind.split()[:2]) if kind.startswith("not ") else kind.split()[0].rstrip(",")
        found[kind] = found.get(kind, "") + text
    return found


def missing_tests(text: str) -> Iterator[str]:
    """What is cited of tests and is not there."""
    code = file = ""
    for path, name in CITED.findall(text):
        if path:
            file, found = path, ROOT / path
            code = found.read_text() if found.is_file() else ""
            if not code:
                yield path
        elif not re.search(rf"^def {name}\(", code, re.MULTILINE):
            yield f"{name} in {file}"


def mutations() -> set[str]:
    return set(re.findall(r'^        name="(.+)",$', (ROOT / "tests/sim/mutations.py").read_text(), re.MULTILINE))


SECTIONS: Mapping[str, str] = promises(TEXT)
each_promise = pytest.mark.parametrize("section", SECTIONS.values(), ids=[name.partition(":")[0] for name in SECTIONS])


def test_every_promise_has_a_section_and_a_line_in_the_table() -> None:
    numbers = [f"G{n}" for n in range(1, NUM_PROMISES + 1)]
    assert [name.partition(":")[0] for name in SECTIONS] == numbers
    assert re.findall(r"^\| \[(G\d+)\]\(#g\d+-", TEXT, re.MULTILINE) == numbers


@each_promise
def test_a_promise_is_said_and_has_all_its_parts_in_order(section: str) -> None:
    assert section.lstrip().startswith("> ")
    assert tuple(re.findall(rf"^\*\*({'|'.join(PARTS)})\*\*", section, re.MULTILINE)) == PARTS
    assert [name for name in PARTS if not part(section, name)] == []


@each_promise
def test_a_promise_has_a_proof_or_says_that_it_has_none(section: str) -> None:
    found = proofs(section)
    assert found.keys() <= {"tests", "simulator", "mutations", "measured", "not proved"}
    assert CITED.search(found.get("tests", "")) or found.get("not proved", "").strip()


def test_every_test_that_is_cited_is_there() -> None:
    assert list(missing_tests(TEXT)) == []


def test_a_citation_of_nothing_is_found() -> None:
    here = "tests/unit/scripts/test_guarantees.py"
    cited = f"`{here}` (`test_a_citation_of_nothing_is_found`, `test_nothing`) and `tests/unit/test_nowhere.py`"
    assert list(missing_tests(cited)) == [f"test_nothing in {here}", "tests/unit/test_nowhere.py"]


@each_promise
def test_what_keeps_a_promise_is_in_the_package(section: str) -> None:
    named = [word for word in WORD.findall(part(section, "Kept by")) if MODULE.fullmatch(word)]
    assert named
    assert [word for word in named if not (ROOT / "megatron_moetion" / word).is_file()] == []


@each_promise
def test_checks_of_the_simulator_and_mutations_are_there(section: str) -> None:
    found = proofs(section)
    checks = WORD.findall(found.get("simulator", ""))
    assert [word for word in checks if word not in (*MODES, *vars(Checker))] == []
    cited = [" ".join(name.split()) for name in re.findall(r'"([^"]+)"', found.get("mutations", ""))]
    assert bool(cited) is ("mutations" in found)
    assert set(cited) - mutations() == set()


def test_whether_tests_run_the_simulator_is_said_as_it_is() -> None:
    assert ("No test runs the simulator yet" in TEXT) is not any((ROOT / "tests" / "sim").glob("test_*.py"))
