# SPDX-License-Identifier: Apache-2.0
"""docs/sizing.md shows what ``moetion plan`` prints. ``python tests/unit/cli/test_sizing_page.py`` writes it anew."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_moetion import cli

PAGE = Path(__file__).parents[3] / "docs" / "sizing.md"
EXAMPLE = re.compile(r"```console\n\$ (moetion plan(?:[^\n]*\\\n)*[^\n]*)\n(.*?)```", re.DOTALL)
TABLE = re.compile(r"(\| model \| GPUs \| iteration \|(?:[^\n]*\n\|)*[^\n]*\n)")
RUNS = {
    "mixtral-8x7b": """--nodes 8
        --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
        --global-batch-size 256 --seq-length 4096 --mfu 0.4""",
    "mixtral-8x22b": """--nodes 16
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8
        --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
        --global-batch-size 256 --seq-length 4096 --mfu 0.4""",
    "qwen3-235b-a22b": """--nodes 32
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 8
        --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
        --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
        --global-batch-size 1024 --seq-length 4096 --mfu 0.3""",
    "deepseek-v3": """--nodes 128
        --pipeline-model-parallel-size 16 --expert-model-parallel-size 64
        --pipeline-model-parallel-layout 'Et*3|(tt|)*29m|L'
        --global-batch-size 8192 --seq-length 4096 --mfu 0.3""",
    "kimi-k2": """--nodes 256
        --pipeline-model-parallel-size 16 --expert-model-parallel-size 64
        --pipeline-model-parallel-layout 'Et|(tt|)*29tt|L'
        --global-batch-size 8192 --seq-length 4096 --mfu 0.3""",
}
NODE_GB_PER_S = (12.5, 3.125)
"""Networks of 100 and 25 Gb/s a node."""


def command(name: str) -> str:
    """As it stands on the page."""
    lines = f"moetion plan --preset {name} --machine dgx-h100 {RUNS[name]}".splitlines()
    return " \\\n    ".join(line.strip() for line in lines)


def printed(text: str) -> str:
    """What a command prints on a terminal of 80 columns."""
    shown = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": "80"}), contextlib.redirect_stdout(shown):
        assert cli.main(shlex.split(text.replace("\\\n", ""))[1:]) == 0
    return "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines())


def networks() -> str:
    """A table of what is recommended for each run on slower networks."""
    lines = [
        "| model | GPUs | iteration | network, GB/s a node | a rank may send, GiB | recommended | "
        "with `--grad-reduce-in-bf16` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in RUNS:
        for rate in NODE_GB_PER_S:
            text = f"{command(name)} --nic-gb-per-s {rate} --json"
            fp32, bf16 = (json.loads(printed(text + more)) for more in ("", " --grad-reduce-in-bf16"))
            model, link = fp32["model"], fp32["resources"]["link_bytes"] / 2**30
            lines.append(
                f"| {name} | {model['world_size']:,} | {model['iteration_s']:.1f} s | {rate:g} | {link:.2f} | "
                f"{recommended(fp32)} | {recommended(bf16)} |"
            )
    return "\n".join(lines) + "\n"


def recommended(found: dict[str, Any]) -> str:
    """A mode with its size, and what a fault costs."""
    advised = found["recommendation"]
    modes = [m for m in found["modes"] if (m["mode"], m["period"]) == (advised["mode"], advised["period"])]
    if not modes:
        least = min(found["modes"], key=lambda mode: mode["sent_bytes"])
        return f"nothing fits: `{least['mode']}` sends {least['sent_bytes'] / 2**30:.2f} GiB at least"
    (shown,) = modes
    form, price = {
        "full": ("`full`", "a fault costs nothing"),
        "exact": (
            f"`exact`, period {shown['period']}",
            f"a fault replays {shown['replayed_steps']} to {shown['replayed_steps_idle']} steps",
        ),
        "popularity": (
            f"`popularity`, {shown['experts']} of {found['state']['num_experts']} experts",
            f"faults cost at most {shown['lost_token_share'] or 1:.2%} of experts' tokens",
        ),
    }[shown["mode"]]
    return f"{form}: {shown['sent_bytes'] / 2**30:.2f} GiB, {shown['node_bytes'] / 2**30:,.0f} GiB a node; {price}"


def test_each_example_is_what_the_program_prints() -> None:
    found = dict(EXAMPLE.findall(PAGE.read_text()))
    assert list(found) == [command(name) for name in RUNS]
    for text, output in found.items():
        assert output == printed(text), f"write {PAGE.name} anew: python {Path(__file__).name}"
        assert "\nMode 'full' fits" in output, "the page says so"
        assert max(len(line) for line in output.splitlines()[:-1]) <= 80


def test_the_table_of_networks_is_what_the_program_says() -> None:
    (table,) = TABLE.findall(PAGE.read_text())
    assert table == networks(), f"write {PAGE.name} anew: python {Path(__file__).name}"


def test_presets_of_every_kind_of_mode_are_on_the_page() -> None:
    """The page would not be of use if one mode fitted everywhere."""
    (table,) = TABLE.findall(PAGE.read_text())
    assert all(f"`{mode}`" in table for mode in ("full", "exact", "popularity"))


def write() -> None:
    """The page with what the program prints now; also from a page whose examples are only named."""
    page = PAGE.read_text()
    for name in RUNS:
        block = f"```console\n$ {command(name)}\n{printed(command(name))}```\n"
        page = page.replace(f"\n{name.upper()}\n", f"\n{block}")
        old = next((m[0] for m in EXAMPLE.finditer(page) if f"--preset {name} " in m[1]), block.rstrip())
        page = page.replace(old, block.rstrip())
    page = page.replace("\nNETWORKS\n", f"\n{networks()}")
    PAGE.write_text(TABLE.sub(lambda _: networks(), page))


if __name__ == "__main__":
    write()
