# SPDX-License-Identifier: Apache-2.0
"""Keeps the troubles of a file that only tells of training from stopping it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_moetion.errors import ConfigError

_logger = logging.getLogger("megatron_moetion")


class Output:
    """What is written because of ``setting``, to ``place``. The first failure is said, and it is ``lost`` from then on.

    Ask ``lost`` before each use. A full disk, a quota or a folder that was unmounted costs what is told of training.
    """

    def __init__(self, setting: str, place: object, *, rank: int, attempt: int) -> None:
        self._setting = setting
        self._place = place
        self._rank = rank
        self._attempt = attempt
        self.lost = False

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Wrap what makes the file. A job that is only begun is refused with ``ConfigError``; a restart goes on."""
        try:
            yield
        except OSError as error:
            if not self._attempt:
                raise ConfigError(
                    f"rank {self._rank}: {self._setting}: {self._place} cannot be written ({error}): "
                    f"name a place where it can, or leave the setting out"
                ) from error
            self._lose(error)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wrap whatever is done with the file later."""
        try:
            yield
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self.lost:
            self.lost = True
            _logger.warning(
                "[moetion] rank %d: %s: nothing more is written to %s (%s); training goes on",
                self._rank, self._setting, self._place, error,
            )  # fmt: skip
