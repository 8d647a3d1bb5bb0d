# SPDX-License-Identifier: Apache-2.0
"""Makes docs/compatibility.md from the results of tests.

A test says what it proves: ``@pytest.mark.proves("Shared experts", "recovery")``. Levels are in ``LEVELS``, and places
of features on the page in ``GROUPS``. ``pytest --compatibility FILE`` writes what became of these tests, and with what
versions. Files in docs/compatibility/ are such results, one for each environment that was tested:

    python -m pytest tests --compatibility docs/compatibility/megatron-core-0.19.2.json
    python scripts/compatibility.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"

LEVELS = {
    "recovery": "bitwise recovery tested on CPU",
    "inventory": "inventory tested",
    "counts": "counted once, tested on CPU",
    "traffic": "messages seen, tested on CPU",
    "refused": "refused",
    "note": "note",
}
"""From the strongest on. A recovery covers the inventory: what was not captured does not come back."""
GROUPS: Mapping[str, Sequence[str]] = {
    "Optimizers": (
        "DistributedOptimizer",
        "Float16OptimizerWithFloat16Params",
        "FP32Optimizer",
        "Adam that counts steps in the group (Apex, Transformer Engine)",
        "torch.optim.",
        "SGD",
        "Gradients reduced in",
        "Precision-aware optimizer",
        "Muon",
        "Adaptive Muon",
        "Lion",
        "CPU-offloaded optimizer",
        "Optimizer state of unknown names",
        "Subclasses of",
        "Several instances of the distributed optimizer",
        "Inner optimizers of other libraries",
    ),
    "Quantised parameters": ("FP8", "MXFP8", "NVFP4", "Attention in FP8", "Quantised parameters"),
    "Models": (
        "Tied embeddings",
        "Untied embeddings",
        "Frozen",
        "A pipeline stage without trained parameters",
        "Shared expert",
        "Router",
        "Quantile balancing",
        "Global auxiliary loss",
        "Expert capacity",
        "Capacity recalibration",
        "Experts without tokens",
        "Dense layers before MoE layers",
        "Multi-token prediction (MTP)",
        "MTP",
        "Multi-latent attention (MLA)",
        "MLA",
        "Norms of queries and keys",
        "Learned softmax offset",
        "HybridModel",
        "Grouped experts",
        "Transformer Engine",
    ),
    "Parallelism": (
        "Expert parallelism",
        "Pipeline parallelism",
        "Virtual pipeline stages",
        "Uneven pipeline",
        "Pipeline layout",
        "Tensor parallelism",
        "Tensor",
        "Context parallelism",
        "--overlap-grad-reduce, --overlap-param-gather",
        "Another order of the kinds of parallelism",
    ),
    "Iterations and schedules": (
        "Steps that a loss scaler skips",
        "Iterations without an optimizer step",
        "Iterations with several optimizer steps",
        "Steps run again by",
        "Megatron's own pretrain()",
        "p2p_communicator",
        "In-place expert re-layout",
    ),
    "Communication and graphs": (
        "CUDA graphs",
        "DeepEP",
        "--moe-enable-deepep",
        "HybridEP",
        "Paged stash",
        "Token counts",
    ),
    "Refused": (
        "Megatron-FSDP",
        "Torch FSDP2",
        "GTP",
        "CUDA-graphed optimizer step",
        "qk_clip",
    ),
}
"""Headings of the page, and how names of features below them begin. Of two beginnings the longer one counts."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one test that proves something of one feature."""

    feature: str
    level: str
    test: str
    """Its pytest id."""
    outcome: str
    """``passed`` or ``failed``. A skipped test proves nothing and is left out."""
    message: str = ""
    """What the user is told, of levels ``refused`` and ``note``."""
    on_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One environment, and all results in it."""

    versions: Mapping[str, str]
    """By package; ``gpu`` is the name of the GPU, if there was one."""
    results: Sequence[Result]

    @property
    def title(self) -> str:
        """What tells environments apart: the heading of a column."""
        optional = (("transformer-engine", "Transformer Engine"), ("gpu", ""))
        parts = [f"{name} {self.versions[key]}".strip() for key, name in optional if self.versions.get(key)]
        return ", ".join([f"megatron-core {self.versions['megatron-core']}", *parts])


def written(leg: Leg) -> str:
    """A leg as a file has it."""
    return json.dumps({"versions": leg.versions, "results": [asdict(r) for r in leg.results]}, indent=1) + "\n"


def read_leg(text: str) -> Leg:
    """The reverse of ``written``."""
    found: dict[str, Any] = json.loads(text)
    return Leg(versions=found["versions"], results=[Result(**result) for result in found["results"]])


def merged(legs: Iterable[Leg]) -> list[Leg]:
    """One leg for each environment, whatever parts of the suite were run at different times; the oldest first."""
    by_versions = sorted(legs, key=lambda leg: (_numbers(leg.versions["megatron-core"]), leg.title))
    return [
        Leg(versions=group[0].versions, results=[result for leg in group for result in leg.results])
        for _, of_title in groupby(by_versions, key=lambda leg: leg.title)
        for group in [list(of_title)]
    ]


def place_of(feature: str) -> tuple[int, int] | None:
    """Where a feature stands on the page: the numbers of its group, and of its name's beginning in that."""
    places = [
        (len(beginning), group, number)
        for group, beginnings in enumerate(GROUPS.values())
        for number, beginning in enumerate(beginnings)
        if feature.startswith(beginning)
    ]
    return max(places)[1:] if places else None


def unknown(results: Iterable[Result]) -> list[str]:
    """What is wrong with the marks of tests: features and levels that have no place on the page."""
    results = list(results)
    wrong = {f"feature {r.feature!r} of {r.test}" for r in results if place_of(r.feature) is None}
    return sorted(wrong | {f"level {r.level!r} of {r.test}" for r in results if r.level not in LEVELS})


def page(legs: Sequence[Leg]) -> str:
    """The whole page."""
    lines = [
        "# Compatibility",
        "",
        "This page is made by `scripts/compatibility.py` from the results of tests in",
        "[docs/compatibility/](compatibility/). A cell says what tests have shown in that environment; an empty one",
        "says that no test of the feature ran there.",
        "",
        "- *Bitwise recovery*: real Megatron-Core trained, its state was lost or overwritten, and was restored. Every",
        "  bit of it and of the next step was what it would have been.",
        "- *Inventory*: every byte of the optimizer's and the model's state on a rank is captured exactly once.",
        "- *Counted once*: tokens are counted once, and no window for snapshots is derived from the iteration.",
        "- *Messages seen*: messages between pipeline stages are recorded; no function of Megatron is replaced for it.",
        "- *Refused*: `attach` raises this error, on all ranks, before the first iteration.",
        "- *Note*: the feature is detected, and this line is logged: by `attach`, or when it happens.",
        "- *Failed*: the named test does not pass there.",
        "",
        "Of a test's cases one is named, with the message of that one.",
        "",
        "| environment | versions |",
        "| --- | --- |",
        *(f"| {leg.title} | {_versions(leg)} |" for leg in legs),
    ]
    found = {r.feature: place for leg in legs for r in leg.results if (place := place_of(r.feature)) is not None}
    for number, group in enumerate(GROUPS):
        names = sorted((place, name) for name, place in found.items() if place[0] == number)
        if names:
            lines += ["", f"## {group}", "", f"| feature | {' | '.join(leg.title for leg in legs)} | tests |"]
            lines += ["| --- " * (len(legs) + 2) + "|"]
            lines += [_row(name, legs) for _, name in names]
    return "\n".join(lines) + "\n"


def _row(feature: str, legs: Sequence[Leg]) -> str:
    of_feature = [[r for r in leg.results if r.feature == feature] for leg in legs]
    tests = dict.fromkeys(_escaped(f"`{r.test}`") for results in of_feature for r in _shown(results))
    cells = [_cell(results) for results in of_feature]
    return f"| {' | '.join([_escaped(feature), *cells, '<br>'.join(tests)])} |"


def _shown(results: Sequence[Result]) -> list[Result]:
    """The results that a cell is made from: failures, and the strongest of what else was shown.

    One case of a test stands for all of the same level; their messages differ in the values that they name.
    """
    failed = [r for r in results if r.outcome != "passed"]
    levels = {r.level for r in results}
    weaker = {"inventory"} if "recovery" in levels else set()
    passed = [r for r in results if r not in failed and r.level not in weaker]
    found: dict[Any, Result] = {}
    for result in sorted(passed, key=lambda r: (list(LEVELS).index(r.level), r.test)):
        found.setdefault((result.level, result.on_gpu, result.test.partition("[")[0]), result)
    return failed + list(found.values())


def _cell(results: Sequence[Result]) -> str:
    return "<br>".join(dict.fromkeys(_escaped(_said(result)) for result in _shown(results)))


def _said(result: Result) -> str:
    if result.outcome != "passed":
        return f"**failed** ({result.level}: `{result.test}`)"
    if result.on_gpu:
        return "tested on GPU"
    text = LEVELS[result.level]
    return f"{text}: {result.message}" if result.message else text


def _versions(leg: Leg) -> str:
    return ", ".join(f"{name} {version}" for name, version in leg.versions.items() if version)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def committed() -> list[Leg]:
    """The results in docs/compatibility/."""
    return merged(read_leg(path.read_text()) for path in sorted(RESULTS.glob("*.json")))


def main() -> int:
    """Write the page."""
    legs = committed()
    wrong = unknown(result for leg in legs for result in leg.results)
    if wrong:
        print("\n".join(f"not in scripts/compatibility.py: {text}" for text in wrong), file=sys.stderr)
        return 1
    PAGE.write_text(page(legs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
