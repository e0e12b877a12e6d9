"""What a training writes while it runs: one line per update, and when it stops. Imported by those who train alone."""

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
SHOWN = {
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

    A process that is told to end (SIGTERM) ends after the update that it is in, and leaves a checkpoint of it.
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
        """Put SIGTERM off until a checkpoint is written, or this ends; only a main thread is told of signals."""
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
        if self.terminated:  # from here on it is the signal that it would have been
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint now, if this process was told to end."""
        control.should_save |= self.terminated

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write the numbers of one update; raise if one of them is not finite."""
        shown = {ours: float(logs[theirs]) for theirs, ours in SHOWN.items() if theirs in logs}
        if "loss" not in shown:  # the summary at the end
            return
        broken = [name for name, value in shown.items() if not math.isfinite(value)]
        if broken:
            raise BrokenInvariant(
                f"update {state.global_step}: {', '.join(broken)} is not finite; lower learning_rate or max_grad_norm"
            )
        learns(state.global_step, shown.get("grad_norm", math.nan))
        shown["clipped"] = float(shown.get("grad_norm", 0.0) > self.config.max_grad_norm)
        line = {"done": state.global_step, "of": state.max_steps, **shown, "time": time.time()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint just written as complete: a kill in the middle leaves one without the mark."""
        complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._raise_sigterm()

    def finish(self) -> None:
        """Leave one line per update, in order; a resumed run wrote some twice."""
        self.file.close()
        rows = {row["done"]: row for row in jsonl.whole(self.path)}
        tidy = self.path.with_suffix(".new")
        jsonl.write(tidy, (rows[done] for done in sorted(rows)))
        tidy.rename(self.path)
