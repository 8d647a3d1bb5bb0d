# SPDX-License-Identifier: Apache-2.0
"""After a recovery that lost tokens: raises expert capacity, and logs the layers' tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megatron_moetion.framework import TokenSource
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.channel import Fabric, Reducer

_LINE = 4000
"""Longest log line about all layers; the event has them all."""
_COUNTS = ("routed", "processed", "debt")
"""What is said of a layer, in this order."""
_SCALE = 1000
"""Words are whole numbers, of thousandths of tokens."""


class Recalibration:
    """Raises expert capacity after a recovery where ``is_on``, and logs the layers' tokens before and afterwards."""

    def __init__(self, tokens: TokenSource, fabric: Fabric, journal: Journal, iterations: int, *, is_on: bool) -> None:
        self._tokens = tokens
        self._fabric = fabric
        self._journal = journal
        self._iterations = iterations
        self._is_on = is_on
        self._began = 0
        self._due: list[tuple[int, str]] = []
        """The iterations from which on the layers are looked at once more, and the names of these looks; soonest first.
        """
        self._layers: tuple[str, ...] = ()
        """Of all ranks."""
        self._reducer: Reducer | None = None
        self._asked: list[tuple[int, str]] = []
        """Looks by round: their iterations and names."""

    def begin(self, iteration: int, lost: Mapping[str, int]) -> None:
        """At a recovery to ``iteration``; ``lost``: each expert's tokens, over all ranks. Collective; call it once."""
        self._began = iteration
        if self._is_on:
            self._tokens.recalibrate(lost)
        found = self._fabric.reduce(over_ranks([self._tokens.layer_tokens()]), lambda a, b: over_ranks([a, b]))
        self._layers = tuple(sorted(found))
        if not found:
            return
        self._say(iteration, "before", {name: found[name] for name in self._layers})
        soon = max(1, self._iterations // 5)
        self._due = [(iteration + soon, "after"), (iteration + self._iterations + soon, "repaid")]
        self._reducer = self._fabric.reducer("tokens of layers", range(self._fabric.world_size), _combine)

    def on_step_end(self, iteration: int) -> None:
        """Look at the layers if that is due, and log what has been heard. All ranks call it; nobody waits."""
        if self._reducer is None:
            return
        if self._due and iteration >= self._due[0][0]:
            self._asked.append((iteration, self._due.pop(0)[1]))
            own = self._tokens.layer_tokens()
            words = [round(_SCALE * own[n][key]) if n in own else 0 for key in _COUNTS for n in self._layers]
            self._reducer.contribute(len(self._asked) - 1, words)
        for result in self._reducer.results():
            columns = np.reshape(result.words, (len(_COUNTS), -1)) / _SCALE
            rows = dict(zip(self._layers, columns.T.tolist(), strict=True))
            layers = {n: _layer(dict(zip(_COUNTS, row, strict=True))) for n, row in rows.items()}
            self._say(*self._asked[result.number], layers)

    def _say(self, iteration: int, when: str, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Log the tokens that each layer's routers route, process and drop in an iteration."""
        if self._fabric.rank:
            return
        text = ", ".join(
            f"{name.removesuffix('.dense')}: {t['routed']:.0f} routed, {t['processed']:.0f} processed, "
            f"{t['dropped']:.0f} dropped, {t['debt']:.0f} owed"
            for name, t in layers.items()
        )
        at = f"{iteration - self._began} iterations after" if iteration > self._began else "before"
        self._journal.info(iteration, f"tokens an iteration, {at} the fault: {text}"[:_LINE])
        self._journal.event("layer_tokens", when=when, iteration=iteration, layers=layers)


def over_ranks(found: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Each rank's ``layer_tokens``, added up over the ranks that run a layer, and the dropped ones among them."""
    layers: dict[str, dict[str, float]] = {}
    for name, tokens in (layer for of_rank in found for layer in of_rank.items()):
        seen = layers.setdefault(name, {"routed": 0.0, "processed": 0.0, "debt": 0.0})
        layers[name] = _layer(
            {
                "routed": seen["routed"] + tokens["routed"],
                "processed": seen["processed"] + tokens["processed"],
                "debt": max(seen["debt"], tokens["debt"]),
            }
        )
    return layers


def _layer(tokens: Mapping[str, float]) -> dict[str, float]:
    return {**tokens, "dropped": tokens["routed"] - tokens["processed"]}


def _combine(mine: Sequence[int], theirs: Sequence[int]) -> Sequence[int]:
    """Of two ranks' words: the sums of what was routed and processed, and the debt that either of them knows."""
    summed = len(mine) * (len(_COUNTS) - 1) // len(_COUNTS)
    return [(a + b if i < summed else max(a, b)) for i, (a, b) in enumerate(zip(mine, theirs, strict=True))]
