# SPDX-License-Identifier: Apache-2.0
"""Makes docs/compatibility.md from the results of tests.

A test says what it proves: ``@pytest.mark.proves("Shared experts", "recovery")``. Levels are in ``LEVELS``, features
and their order in ``FEATURES``. ``pytest --compatibility FILE`` writes what became of these tests, and with what
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
    "refused": "refused",
    "note": "note",
}
"""From the strongest on. A recovery covers the inventory: what was not captured does not come back."""
FEATURES: Mapping[str, Sequence[str]] = {
    "Optimizers": (
        "DistributedOptimizer, fp32",
        "DistributedOptimizer, bf16",
        "DistributedOptimizer, fp16",
        "Float16OptimizerWithFloat16Params, bf16",
        "Float16OptimizerWithFloat16Params, fp16",
        "FP32Optimizer",
        "Adam that counts steps in the group (Apex, Transformer Engine)",
        "torch.optim.AdamW",
        "torch.optim.Adam",
        "SGD with momentum",
        "Gradients reduced in bf16",
        "Gradients reduced in fp16",
        "Precision-aware optimizer, bf16 moments",
        "Muon (LayerWiseDistributedOptimizer)",
        "CPU-offloaded optimizer",
        "Optimizer state of unknown names",
    ),
    "Quantised parameters": (
        "FP8 parameters, delayed scaling",
        "MXFP8 parameters",
    ),
    "Models": (
        "Tied embeddings",
        "Untied embeddings",
        "Frozen parameters",
        "Shared experts",
        "Router with expert bias",
        "Expert capacity",
        "Capacity recalibration",
        "Experts without tokens",
    ),
    "Parallelism": (
        "Expert parallelism",
        "Pipeline parallelism",
        "Virtual pipeline stages",
        "--overlap-grad-reduce, --overlap-param-gather",
    ),
    "Iterations and schedules": (
        "Steps that a loss scaler skips",
        "Iterations without an optimizer step",
        "Iterations with several optimizer steps",
        "Steps run again by the rerun state machine",
        "Steps run again by paged stash",
    ),
    "On a GPU only": (
        "CUDA graphs of layers or their parts",
        "CUDA graphs of whole iterations",
        "CUDA graphs of the router, with capacity recalibration",
        "DeepEP (--moe-flex-dispatcher-backend deepep)",
        "--moe-enable-deepep",
        "HybridEP (--moe-flex-dispatcher-backend hybridep)",
        "Paged stash",
        "Token counts of padded experts' inputs (FP8, FP4)",
    ),
}


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


def unknown(results: Iterable[Result]) -> list[str]:
    """What is wrong with the marks of tests: features and levels that are not listed here."""
    features = {name for names in FEATURES.values() for name in names}
    wrong = {f"feature {r.feature!r} of {r.test}" for r in results if r.feature not in features}
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
        "- *Refused*: `attach` raises this error, on all ranks, before the first iteration.",
        "- *Note*: the feature is detected and `attach` logs this line.",
        "- *Failed*: the named test does not pass there.",
        "",
        "| environment | versions |",
        "| --- | --- |",
        *(f"| {leg.title} | {_versions(leg)} |" for leg in legs),
    ]
    for group, names in FEATURES.items():
        lines += ["", f"## {group}", "", f"| feature | {' | '.join(leg.title for leg in legs)} | tests |"]
        lines += ["| --- " * (len(legs) + 2) + "|"]
        lines += [_row(name, legs) for name in names]
    return "\n".join(lines) + "\n"


def _row(feature: str, legs: Sequence[Leg]) -> str:
    of_feature = [[r for r in leg.results if r.feature == feature] for leg in legs]
    tests = dict.fromkeys(_escaped(f"`{r.test}`") for results in of_feature for r in _shown(results))
    cells = [_cell(results) for results in of_feature]
    return f"| {' | '.join([_escaped(feature), *cells, '<br>'.join(tests) or 'not tested'])} |"


def _shown(results: Sequence[Result]) -> list[Result]:
    """The results that a cell is made from, one test of a kind: failures, and the strongest of what else was shown."""
    failed = [r for r in results if r.outcome != "passed"]
    levels = {r.level for r in results}
    weaker = {"inventory"} if "recovery" in levels else set()
    passed = [r for r in results if r not in failed and r.level not in weaker]
    found: dict[Any, Result] = {}
    for result in sorted(passed, key=lambda r: (list(LEVELS).index(r.level), r.test)):
        found.setdefault((result.level, result.on_gpu, result.message, result.test.partition("[")[0]), result)
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
