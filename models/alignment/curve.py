"""What a training writes while it runs, one line per update, and when it stops early.

It imports transformers, so the files that train import it inside their functions.
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from models.alignment.checkpoints import complete
from models.alignment.guards import learns
from models.errors import BrokenInvariant
from models.files import jsonl
from models.recipe import Training

PROGRESS = "progress.jsonl"
"""One line per update, while the training runs and afterwards: `done`, `of`, and the numbers of SHOWN."""
SHOWN = {  # the trainer's name of a number → ours
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
}


class TrainingMonitor(TrainerCallback):  # type: ignore[misc]
    """Writes one line per update to `progress.jsonl`, marks checkpoints as complete, and stops at the first NaN.

    After SIGTERM the process finishes the update that it is in, leaves a checkpoint of it, and ends.
    """

    def __init__(self, out: Path, config: Training) -> None:
        self.path = out / PROGRESS
        self.config = config
        self.file = self.path.open("a")
        self.file.write("\n" if self.path.stat().st_size else "")  # a kill may have left half a line
        self.started = time.monotonic()
        self.terminated = False

    @contextmanager
    def defer_sigterm(self) -> Iterator[None]:
        """Put SIGTERM off until a checkpoint is written, or until this block ends."""
        # Python lets only the main thread handle signals; elsewhere SIGTERM ends the process at once
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            self._raise_sigterm()

    def _note_sigterm(self, *_: Any) -> None:
        self.terminated = True

    def _raise_sigterm(self) -> None:
        # The signal is sent again without our handler, so that the parent sees a process that SIGTERM ended
        if self.terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint now, if SIGTERM came."""
        control.should_save |= self.terminated

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write the numbers of one update; raise if one of them is not finite."""
        figures = {name: float(logs[key]) for key, name in SHOWN.items() if key in logs}
        if "loss" not in figures:  # TRL's summary of the whole training, which is no update
            return
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if broken:
            raise BrokenInvariant(
                f"update {state.global_step}: {', '.join(broken)} is not finite; lower learning_rate or max_grad_norm"
            )
        learns(state.global_step, figures.get("grad_norm", math.nan))
        figures["clipped"] = float(figures.get("grad_norm", 0.0) > self.config.max_grad_norm)
        line = {"done": state.global_step, "of": state.max_steps, **figures, "time": time.time()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint just written as complete: a kill in the middle leaves one without the mark."""
        complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._raise_sigterm()

    def finish(self) -> None:
        """Leave one line per update, in order."""
        self.file.close()
        # A killed run goes on from its last checkpoint and writes the updates after it again: the later lines count
        rows = {row["done"]: row for row in jsonl.whole_rows(self.path)}
        tidy = self.path.with_suffix(".new")
        jsonl.write(tidy, (rows[done] for done in sorted(rows)))
        tidy.rename(self.path)
