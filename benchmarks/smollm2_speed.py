"""LoRA DPO of SmolLM2-135M on real pairs: seconds per pair, ours against plain TRL, in one run.

Three arms, each in a process of its own: `plain` is TRL's DPOTrainer with its defaults (live reference, its own order),
`ours` is models.reference and models.alignment, `same` is plain TRL on the batches of `ours`, which must give the same
losses. The reference is counted once for a grid of two values of λ.

    python benchmarks/smollm2_speed.py BASE PAIRS [COUNT]      BASE: .gguf or folder; PAIRS: JSONL of comparisons
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.launch import ALLOCATOR

GRID = 2
BATCH = 4


def main() -> None:
    """Run the three arms and print the ratio."""
    base, pairs, count = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "32"
    with tempfile.TemporaryDirectory() as folder:
        told = {}
        prepare(base, pairs, int(count), Path(folder))
        for arm in ("plain", "ours", "same"):
            command = [sys.executable, __file__, "--arm", arm, folder]
            env = os.environ | (ALLOCATOR if arm == "ours" else {})  # what every worker gets
            subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            told[arm] = json.loads((Path(folder) / f"{arm}.json").read_text())
            print(arm, {k: v for k, v in told[arm].items() if k != "losses"}, flush=True)
    plain = told["plain"]["training"] / told["plain"]["pairs"]
    ours = (told["ours"]["training"] + told["ours"]["reference"] / GRID) / told["ours"]["pairs"]
    same = told["same"]["losses"]
    gap = max(abs(a - b) for a, b in zip(told["ours"]["losses"], same, strict=False))
    print(f"plain TRL {plain:.2f} s per pair, ours {ours:.2f} s per pair: ratio {ours / plain:.2f}")
    print(f"losses of the first {len(same)} updates differ by at most {gap:.1e}")


def prepare(base: str, pairs: str, count: int, folder: Path) -> None:
    """Write the base policy and the pairs."""
    from models import policy, preferences
    from models.artifacts import Sources
    from models.recipe import Data

    for name in ("base", "pairs"):
        (folder / name).mkdir()
    made = policy.base(base, "", 0, policy.base_digest(base), folder / "base")
    sources = Sources(path=folder, digest="", files={"steps.0": str(Path(pairs).resolve())})
    config = Data(max_tokens=384, validation=0.1, test=0.1)
    found = preferences.prepare(sources, "steps.0", "helpful", "dpo", "", count, config, folder / "pairs")
    told = {"policy": made.facts(), "preferences": found.facts()}
    (folder / "made.json").write_text(json.dumps(told))


def arm(name: str, folder: Path) -> None:
    """Run one arm, and write its seconds and losses."""
    import torch

    from models import alignment, policy, reference
    from models.artifacts import Policy, Preferences
    from models.batching import order
    from models.recipe import Compute, Data, Step
    from models.shared_prompt import tokens

    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    told = json.loads((folder / "made.json").read_text())
    base = Policy(path=folder / "base", **told["policy"])
    pairs = Preferences(path=folder / "pairs", **told["preferences"])
    compute, data = Compute(device="cpu", threads=threads), Data(max_tokens=384)
    step = Step(
        metric="helpful", data="-", adapter_rank=16, learning_rate=2e-4, epochs=1, batch=BATCH, similar_lengths=True,
        save_every=10**6,
    )  # fmt: skip
    out = folder / name
    out.mkdir()
    if name == "ours":
        started = time.perf_counter()
        scored_at = folder / "scored"
        scored_at.mkdir()
        scored = reference.score(base, pairs, ["train"], data, compute, scored_at)
        before = time.perf_counter() - started
        (folder / "scored.json").write_text(json.dumps(scored.facts()))
        started = time.perf_counter()
        alignment.dpo(base, scored, step, 1, 0.1, 0, compute, out)
        losses = [json.loads(line)["loss"] for line in (out / "progress.jsonl").read_text().splitlines()]
        write(folder, name, time.perf_counter() - started, scored.counts["train"], losses, before)
        return
    rows: list[dict[str, Any]]
    model, tokenizer = policy.load(base, compute, train=True)
    rows, _ = reference.tokenise(tokenizer, folder / "pairs" / "train.jsonl", data.max_tokens)
    if name == "same":
        lengths = [tokens(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
        places = order(lengths, step, 0)
        rows = [rows[i] for i in places][: 3 * BATCH]
    plain(model, tokenizer, rows, name, folder, len(rows) if name == "plain" else len(places))


def plain(model: Any, tokenizer: Any, rows: list[dict], name: str, folder: Path, total: int) -> None:
    """TRL's trainer on tokenised rows, otherwise with TRL's defaults: adapters off is the live reference."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    args = DPOConfig(
        output_dir=str(folder / name), per_device_train_batch_size=BATCH, learning_rate=2e-4, bf16=False, use_cpu=True,
        lr_scheduler_type="cosine", warmup_steps=0.03, max_length=None, logging_steps=1, save_strategy="no", beta=0.1,
        max_steps=total // BATCH, report_to="none", seed=0,
        train_sampling_strategy="random" if name == "plain" else "sequential",
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Tokenised(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter
    )
    if name == "same":  # the same schedule, only the first batches
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step >= len(rows) // BATCH

        trainer.add_callback(Stop())
    started = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write(folder, name, time.perf_counter() - started, len(rows), losses, 0.0)


def write(folder: Path, name: str, training: float, pairs: int, losses: list[float], before: float) -> None:
    """Write what an arm found."""
    told = {"training": training, "reference": before, "pairs": pairs, "losses": losses}
    (folder / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1] == "--arm":
        arm(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
