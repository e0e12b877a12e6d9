"""The average of two policies: seconds and peak memory, ours against mergekit's linear merge, and their difference.

Two policies of a Llama of random weights (0.7 billion parameters, float32, 2.8 GB each) are averaged with q = 0.3; the
arms take turns, each run in a process of its own. Ours writes the digest that names the result, too.

    pip install mergekit==0.1.5
    python benchmarks/merge_speed.py [ROUNDS]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Q = 0.3


def main() -> None:
    """Run both arms in turn and print what each took."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, __file__, "--write", place], check=True, stderr=subprocess.DEVNULL)
        (folder / "linear.yaml").write_text(
            f"merge_method: linear\ndtype: float32\nmodels:\n"
            f"- {{model: {folder / 'safe'}, parameters: {{weight: {Q}}}}}\n"
            f"- {{model: {folder / 'reward'}, parameters: {{weight: {1 - Q}}}}}\n"
        )
        arms = {
            "ours": [sys.executable, __file__, "--merge", place],
            "mergekit": [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "linear.yaml"),
                         str(folder / "mergekit"), "--quiet"],
        }  # fmt: skip
        for _ in range(rounds):
            for name, command in arms.items():
                shutil.rmtree(folder / name, ignore_errors=True)
                seconds, peak = _watched(command)
                print(f"{name:9} {seconds:5.1f} s, at most {peak:5.0f} MiB resident", flush=True)
        print(f"largest difference between the two results: {_apart(folder / 'ours', folder / 'mergekit'):.1e}")


def _watched(command: list[str]) -> tuple[float, float]:
    """Return seconds and peak resident MiB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, used.ru_maxrss / 1024


def _apart(a: Path, b: Path) -> float:
    """Return the largest difference between the tensors of two folders."""
    from safetensors.torch import load_file

    ours, theirs = ({k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (a, b))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def write(folder: Path) -> None:
    """Write two policies."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.artifacts import Policy
    from models.data import town
    from models.policy.weights import describe

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=13, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate(("safe", "reward")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name, max_shard_size="50GB")
        town.tokenizer().save_pretrained(folder / name)
        made = describe(folder / name, Policy(path=folder / name, digest="", name=name, kind="step"))
        (folder / f"{name}.json").write_text(json.dumps(made.facts()))


def merge(folder: Path) -> None:
    """Average them as the flow does."""
    from models.alignment import merge as merging
    from models.artifacts import Policy

    (folder / "ours").mkdir()
    safe, reward = (
        Policy(path=folder / name, **json.loads((folder / f"{name}.json").read_text())) for name in ("safe", "reward")
    )
    merging.interpolate(folder / "ours", safe, reward, Q)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--merge"]:
        merge(Path(sys.argv[2]))
    else:
        main()
