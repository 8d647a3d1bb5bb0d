# SPDX-License-Identifier: Apache-2.0
"""After a recovery that lost tokens: raises expert capacity, and logs the layers' tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_moetion.framework import TokenSource
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.channel import Fabric

_LINE = 4000
"""Longest log line about all layers; the event has them all."""


class Recalibration:
    """Raises expert capacity after a recovery where ``is_on``, and logs the layers' tokens before and afterwards.

    Every call is collective, over the fabric alone. After a ``ChannelError`` the fabric must not be used again.
    """

    def __init__(self, tokens: TokenSource, fabric: Fabric, journal: Journal, iterations: int, *, is_on: bool) -> None:
        self._tokens = tokens
        self._fabric = fabric
        self._journal = journal
        self._iterations = iterations
        self._is_on = is_on
        self._began = 0
        self._due: list[tuple[int, str]] = []
        """The iterations from which on the layers are logged once more, and the names of these logs; soonest first."""

    def begin(self, iteration: int, lost: Mapping[str, int]) -> None:
        """At a recovery to ``iteration``; ``lost``: each expert's tokens, over all ranks."""
        self._began = iteration
        if self._is_on:
            self._tokens.recalibrate(lost)
        self._look(iteration, "before")
        soon = max(1, self._iterations // 5)
        self._due = [(iteration + soon, "after"), (iteration + self._iterations + soon, "repaid")]

    def on_step_end(self, iteration: int) -> None:
        """Log the layers if that is due. May be left out in any iteration."""
        if self._due and iteration >= self._due[0][0]:
            self._look(iteration, self._due.pop(0)[1])

    def _look(self, iteration: int, when: str) -> None:
        """Log the tokens that each layer's routers route, process and drop in an iteration."""
        layers = over_ranks(self._fabric.gather(self._tokens.layer_tokens()))
        if not layers or self._fabric.rank:
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
        seen = layers.setdefault(name, {"routed": 0.0, "processed": 0.0, "dropped": 0.0, "debt": tokens["debt"]})
        seen["routed"] += tokens["routed"]
        seen["processed"] += tokens["processed"]
        seen["dropped"] = seen["routed"] - seen["processed"]
    return layers
