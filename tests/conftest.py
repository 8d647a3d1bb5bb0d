# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests: property tests replay the same examples, and helper modules are found beside the tests.

``--compatibility FILE`` writes what tests with a ``proves`` mark have shown; see ``scripts/compatibility.py``.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from compatibility import Leg, Result, written
from hypothesis import settings

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("unit", "dist")]
pytest.register_assert_rewrite("jobs")

settings.register_profile("moetion", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("moetion")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write what tests with a proves mark have shown, as docs/compatibility/ has it"
    parser.addoption("--compatibility", type=Path, metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--compatibility")) is not None:
        config.pluginmanager.register(Proofs(file))


class Proofs:
    """What has been shown so far; written at the end. With ``--collect-only``: what would be."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._results: dict[tuple[str, str, str], Result] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.getoption("--collect-only"):
            self._add(r for item in session.items for r in _results(item, "collected"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        messages = [str(value) for name, value in report.user_properties if name == "message"]
        if report.failed or (report.when == "call" and report.passed):
            self._add(_results(item, report.outcome, messages[0] if messages else ""))
        return report

    def pytest_sessionfinish(self) -> None:
        results = [self._results[key] for key in sorted(self._results)]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(written(Leg(versions=_versions(), results=results)))

    def _add(self, results: Iterator[Result]) -> None:
        self._results |= {(r.feature, r.level, r.test): r for r in results}


def _results(item: pytest.Item, outcome: str, message: str = "") -> Iterator[Result]:
    for mark in item.iter_markers("proves"):
        feature, level = mark.args
        on_gpu = item.get_closest_marker("gpu") is not None
        yield Result(feature=feature, level=level, test=item.nodeid, outcome=outcome, message=message, on_gpu=on_gpu)


def _versions() -> dict[str, str]:
    """Of what results depend on; Transformer Engine counts where it can be imported, as Megatron has it."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = {"megatron-core": metadata.version("megatron-core"), "torch": metadata.version("torch")}
    if _printed("import transformer_engine.pytorch; print('yes')"):
        found["transformer-engine"] = metadata.version("transformer-engine")
    return found | {"python": platform.python_version(), "gpu": _printed(code)}


def _printed(code: str) -> str:
    """The last line of a program of its own, which may fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition("\n")[2] if done.returncode == 0 else ""
