# SPDX-License-Identifier: Apache-2.0
"""Imports torch once and forks ranks from there, so that a job of four real processes starts in a tenth of a second.

Reads one JSON request a line, answers each with one line. It has no threads and touches no gloo itself; a rank is a
process of its own from before the first connection to its end.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

TOGETHER_S = 15.0
"""How long ranks may outlive the first one that gives up by itself."""
BUG = 70
"""Exit code of a rank that raised what nobody expects."""


def serve(run_rank: Callable[[Mapping[str, Any], Mapping[str, str]], int]) -> None:
    """Answer requests until the other side closes the pipe."""
    _die_with_parent()
    gc.freeze()  # ranks share what was imported; their collectors would touch, and so copy, all of it
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        answer = _launch(json.loads(line), run_rank)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _launch(request: Mapping[str, Any], run_rank: Callable[[Mapping[str, Any], Mapping[str, str]], int]) -> Any:
    """Run all ranks of one attempt. One that is killed or has a bug takes the others with it: supervisors do that."""
    ranks = {_fork(request, environment, run_rank): int(environment["RANK"]) for environment in request["ranks"]}
    codes: dict[int, int] = {}
    now = time.monotonic()
    limit, late = now + request["limit_s"], False
    kill, stop = request.get("kill"), request.get("stop")
    stopped, resume_at = 0, 0.0
    while len(codes) < len(ranks):
        for pid in [p for p in ranks if ranks[p] not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                codes[ranks[pid]] = code
                if code:
                    limit = min(limit, time.monotonic() + (0 if code < 0 else 0.5 if code == BUG else TOGETHER_S))
        if kill and _steps(Path(kill["notes"])) >= kill["steps"]:
            time.sleep(kill["delay_s"])
            os.kill(next(p for p, r in ranks.items() if r == kill["rank"]), signal.SIGKILL)
            kill = None
        if stop and _steps(Path(stop["notes"])) >= stop["steps"]:
            stopped = next(p for p, r in ranks.items() if r == stop["rank"])
            os.kill(stopped, signal.SIGSTOP)
            resume_at, stop = time.monotonic() + stop["seconds"], None
        if stopped and time.monotonic() > resume_at:
            os.kill(stopped, signal.SIGCONT)
            stopped = 0
        if time.monotonic() > limit:
            late = late or not any(code for code in codes.values())
            for pid in (p for p in ranks if ranks[p] not in codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return {"codes": [codes[r] for r in sorted(codes)], "late": late}


def _steps(notes: Path) -> int:
    return notes.read_bytes().count(b'"event": "step"') if notes.exists() else 0


def _fork(
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    run_rank: Callable[[Mapping[str, Any], Mapping[str, str]], int],
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = BUG
    try:
        _die_with_parent()
        log = os.open(
            Path(request["folder"]) / f"rank{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run_rank(request, environment)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


DRIVERS = {
    "toy": ("toy_trainer", ("folder", "config", "toy")),
    "megatron": ("megatron_trainer", ("folder",)),
    "exact": ("megatron_exact", ("folder", "store", "case")),
    "precision": ("megatron_precision", ("folder", "store", "case")),
    "muon": ("megatron_muon", ("folder", "store", "work")),
    "models": ("megatron_models", ("folder", "store", "cases")),
    "layouts": ("megatron_layouts", ("folder",)),
    "reruns": ("megatron_reruns", ("folder", "store")),
    "te": ("te_models", ("folder",)),
    "fp8": ("fp8_ranks", ("folder",)),
    "megatron_lm": ("megatron_lm_ranks", ("folder", "argv", "acts")),
    "trainer": ("bundled_trainer", ("argv", "die_in_save", "poison")),
}
"""By kind of job: the module whose ``main`` is one rank, and what of a request it is called with."""


def _run_rank(driver: Any, names: Sequence[str], request: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    values = {**request, **{name: Path(request[name]) for name in ("folder", "store") if name in request}}
    if "configs" in request:
        values["config"] = request["configs"][int(environment["RANK"])]
    return int(driver.main(*(values[name] for name in names), environment))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("unit", "te")]
    module, names = DRIVERS[sys.argv[1]]
    serve(partial(_run_rank, importlib.import_module(module), names))
