# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron_moetion.megatron_lm`` on the CPU: the first argument is a file for losses, then as there.

Of Megatron's functions only ``training_log`` is replaced here, to write down every bit of every loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from official_pretrain import redirect

from megatron_moetion.megatron_lm.__main__ import run


def note_losses(path: Path) -> None:
    from megatron.training import training

    original = training.training_log

    def training_log(losses: dict[str, Any], total: Any, rate: Any, iteration: int, *args: Any, **kwargs: Any) -> Any:
        if losses:
            with path.open("a") as out:
                out.write(json.dumps({"iteration": iteration, "loss": float(losses["lm loss"]).hex()}) + "\n")
        return original(losses, total, rate, iteration, *args, **kwargs)

    training.training_log = training_log


if __name__ == "__main__":
    redirect()
    note_losses(Path(sys.argv[1]))
    sys.exit(run(sys.argv[2:]))
