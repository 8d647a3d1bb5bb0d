# SPDX-License-Identifier: Apache-2.0
"""The writer of one rank as a process: started with a document on its standard input, and heard a line at a time.

It is in the process group of its rank, so it gets the signals that end a job (``SIGTERM``), and outlives the rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

MODULE = "megatron_moetion.export"
_LINE_MAX = 1 << 16
_MADE_BY_LAUNCHERS = ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_")


class WriterProcess:
    """See ``Writer``. ``settings``: what the writer is told at its start, as JSON."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_MADE_BY_LAUNCHERS)}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the same Megatron as here
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None, "a pipe"
        assert self._process.stdout is not None, "a pipe"
        self._to, self._from = self._process.stdin, self._process.stdout
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)
        self._heard = b""
        self.send(settings)

    def send(self, message: Mapping[str, Any]) -> bool:
        """See ``Writer``."""
        line = json.dumps(message).encode() + b"\n"
        try:
            return self._to.write(line) == len(line)  # else it has not read for long
        except OSError:
            return False

    def hear(self) -> list[dict[str, Any]]:
        """See ``Writer``. A line that is no document ends the process: something else has written there."""
        try:
            while data := self._from.read(_LINE_MAX):
                self._heard += data
        except OSError:
            return []
        *lines, self._heard = self._heard.split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            self._process.kill()
            return []

    @property
    def ended(self) -> str | None:
        """See ``Writer``."""
        code = self._process.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    def kill(self) -> None:
        """See ``Writer``."""
        self._process.kill()

    def end(self, limit_s: float) -> None:
        """See ``Writer``."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)

    def close(self) -> None:
        """See ``Writer``. Nobody waits for it: it ends by itself."""
        for pipe in (self._to, self._from):
            pipe.close()
