# SPDX-License-Identifier: Apache-2.0
"""Makes docs/flags.md from ``MoetionConfig``: ``python scripts/flags_page.py``. A test holds the page to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from megatron_moetion.config import MODES, TOPICS, MoetionConfig, flag_of

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
WIDTH = 120
_CODE = re.compile(r"(?<!\w)'([^']+)'|--[a-z][\w-]*\w|\b[A-Z]+(?:_[A-Z]+)+\b|/dev/shm/[\w-]+")
INTRODUCTION = """\
# Flags

This page has every setting of MoEtion: the flags of the launcher for Megatron-LM and of the bundled trainer, and the
fields of `MoetionConfig` for loops of your own. It is made from `megatron_moetion/config.py` by
`scripts/flags_page.py`, and a test holds it to that file.

- `--moetion` switches MoEtion on. No other flag is needed, and none counts without it.
- `--moetion-run-id NAME` is `MoetionConfig(run_id="NAME")`, and so on: the field is the flag without `--moetion-`.
- *Modes*: those in which the setting acts. Some settings are refused in other modes, and mode `auto` leaves these modes
  out; the rest has no effect there.
- *At a restart*: what another value does when a run is started again under its name.
- *Ranks*: whether ranks of one run may have different values. A value that must be equal and is not ends the start,
  with both values in the message.
- A value that a setting cannot have is refused before iteration 1, with the flag and the value in the message.

Flags of training itself are Megatron's; `pretrain_gpt_moe.py --help` lists those of the bundled trainer. Words are
defined in [architecture.md](architecture.md#words).
"""


def page() -> str:
    """The text of docs/flags.md."""
    settings = fields(MoetionConfig)
    parts = [INTRODUCTION, index(settings)]
    for topic in TOPICS:
        parts += [f"## {topic}\n", *(section(each) for each in settings if each.metadata["topic"] == topic)]
    return "\n".join(parts)


def index(settings: Iterable[Field[Any]]) -> str:
    """A table of all flags by topic."""
    rows = ["| | |", "| --- | --- |"]
    by_topic = {topic: [_link(s) for s in settings if s.metadata["topic"] == topic] for topic in TOPICS}
    rows += [f"| [{topic}](#{_anchor(topic)}) | {', '.join(links)} |" for topic, links in by_topic.items()]
    return "\n".join([*rows, ""])


def section(of: Field[Any]) -> str:
    """One flag: its facts in a table, then what it means."""
    facts = dict(_facts(of))
    table = [" | ".join(["", *facts, ""]).strip(), "| " + " | ".join("---" for _ in facts) + " |",
             " | ".join(["", *facts.values(), ""]).strip()]  # fmt: skip
    meaning = _sentence(of.metadata["help"])
    if of.metadata.get("expert"):
        meaning += " `--help` does not show this flag: no run is known to need another value."
    return "\n".join([f"### {_flag(of)}\n", *table, "", *wrap(meaning, WIDTH, break_on_hyphens=False), ""])


def _facts(of: Field[Any]) -> Iterator[tuple[str, str]]:
    meta = of.metadata
    yield "default", _default(of)
    if "unit" in meta:
        yield "unit", meta["unit"]
    yield "values", _values(of)
    yield "modes", _modes(of)
    yield "at a restart", _quoted(meta.get("fixed", "may change"))
    yield "ranks", "may differ" if meta.get("per_rank") else "equal"


def _default(of: Field[Any]) -> str:
    if of.default is False:
        return "not given"
    if of.default != "":
        return f"`{of.default}`"
    return "see below" if "default: " in of.metadata["help"].lower() else "none"


def _values(of: Field[Any]) -> str:
    meta = of.metadata
    if "values" in meta:
        return str(meta["values"])
    if "choices" in meta:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    if "minimum" in meta:
        return f"{meta['minimum']} or more"
    return "a flag without a value" if isinstance(of.default, bool) else "text"


def _modes(of: Field[Any]) -> str:
    meta = of.metadata
    named = meta.get("modes") or meta.get("used_in") or MODES
    if tuple(named) == MODES:
        return "all"
    return " and ".join(f"`{mode}`" for mode in named) + (", refused in others" if "modes" in meta else "")


def _flag(of: Field[Any]) -> str:
    return flag_of(f"moetion_{of.name}")


def _link(of: Field[Any]) -> str:
    return f"[`{_flag(of)}`](#{_anchor(_flag(of))})"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _sentence(help: str) -> str:
    text = _quoted(help)
    return text[0].upper() + text[1:] + "."


def _quoted(text: str) -> str:
    """Names as code: what stands in single quotes, flags, variables of the environment, and folders."""
    return _CODE.sub(lambda found: f"`{found[1] or found[0]}`", text)


if __name__ == "__main__":
    PAGE.write_text(page())
