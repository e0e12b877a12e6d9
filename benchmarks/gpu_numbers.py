"""Log-probs, first losses, kernels and answers of one shape, measured: `gpu.py` runs each function as a unit."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from gpu_shapes import task

if TYPE_CHECKING:
    import torch
    from gpu import Tell

    from models.artifacts import Reference


def numerics(tell: Tell, folder: Path, shape: str, tiny: bool) -> None:
    """Measure how far log-probs of the same weights lie apart, in nats per answer."""
    import torch

    from models.alignment import reference
    from models.policy import logprobs, weights

    job = task(folder, shape, "lora")
    model, tokenizer = weights.load(job.base, job.compute)
    rows = reference.tokenise(tokenizer, job.pairs.path / "train.jsonl", job.data.max_tokens)[0][:64]
    lengths = [len(row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]

    def told(some: list[Any] = rows) -> list[float]:
        return [value for pair in logprobs.pair_logps(model, some, tokenizer.pad_token_id) for value in pair]

    device, exact = model.device.type, told()
    with tell.stage("float32: rows alone against together (the guard allows 1e-3)") as facts:
        facts |= _gap(exact, [value for row in rows for value in told([row])], lengths)
    with (
        tell.stage("float32 against bfloat16 autocast, our own forward") as facts,
        torch.autocast(device, torch.bfloat16),
    ):
        facts |= _gap(exact, told(), lengths)
    with tell.stage("float32 against TF32") as facts:
        torch.backends.cuda.matmul.allow_tf32 = True
        facts |= _gap(exact, told(), lengths)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, half in (("float32", False), ("bfloat16 autocast", True)):
        with tell.stage(f"our float32 forward against TRL's head in {name}") as facts:
            facts |= _gap(exact, trl_logps(model, rows, tokenizer.pad_token_id, half), lengths)
    with tell.stage("float32 against weights rounded to bfloat16") as facts:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        facts |= _gap(exact, told(), lengths)


def _gap(a: list[float], b: list[float], lengths: list[int]) -> dict[str, Any]:
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    scaled = max(gap / math.sqrt(n) for gap, n in zip(gaps, lengths, strict=True))
    summary = {"max_nats": max(gaps), "mean_nats": sum(gaps) / len(gaps), "max_per_root_token": scaled}
    return {key: float(f"{value:.3g}") for key, value in summary.items()} | {"answers": len(a)}


def trl_logps(model: Any, rows: list[dict[str, Any]], pad: int, half: bool) -> list[float]:
    """Return the log-probs of both answers of each row as TRL's trainer computes them."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    if "fused_lm_head" not in model.forward.__code__.co_varnames:
        add_fused_lm_head(model)
    found = []
    for row in rows:
        sides = [row["chosen_ids"], row["rejected_ids"]]
        width = len(row["prompt_ids"]) + max(map(len, sides))
        ids, mask, labels = [], [], []
        for answer in sides:
            text = row["prompt_ids"] + answer
            spare = width - len(text)
            ids.append(text + [pad] * spare)
            mask.append([1] * len(text) + [0] * spare)
            labels.append([-100] * len(row["prompt_ids"]) + answer + [-100] * spare)
        batch = [torch.tensor(part, device=model.device) for part in (ids, mask, labels)]
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            out = model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2], fused_lm_head=True)
        found += out.log_probs.double().sum(1).tolist()
    return found


def first(tell: Tell, folder: Path, shape: str, adapter: str, tiny: bool) -> None:
    """Compare the first losses with ln 2: as it is today, in float32, and with references in training numerics."""
    import arms

    from models.alignment import dpo, guards, reference
    from models.policy import weights

    job = task(folder, shape, adapter, updates=3)
    made = folder / f"scored-{adapter}"
    made.mkdir()
    scored = reference.score(made, job.base, job.pairs, ["train"], job.data.max_tokens, job.compute)
    own = dpo.arguments
    for name, half, exact in (("bf16, float32 reference: today's", True, True), ("float32", False, True),
                              ("bf16, reference by TRL's head in bf16", True, False)):  # fmt: skip
        with tell.stage(name) as facts, ExitStack() as stack:
            out = folder / f"first-{adapter}-{half}-{exact}"
            out.mkdir()
            options = {"bf16": half}
            stack.enter_context(arms.replaced(dpo, "arguments", lambda *a, o=options: own(*a) | o))
            if not exact:
                stack.enter_context(arms.replaced(guards, "agree", lambda *_: None))
                model, tokenizer = weights.load(job.base, job.compute)
                _rescore(scored, trl_logps(model, _read(scored), tokenizer.pad_token_id, True))
                del model
            step = job.config
            dpo.train(out, job.base, scored, step.objective(arms.BETA, 1), step.training, 0, job.compute)
            lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
            facts |= {"losses": [line["loss"] for line in lines], "first_minus_ln2": lines[0]["loss"] - math.log(2)}
            facts["mean_log_ratio_nats"] = lines[0]["chosen"] / arms.BETA
        shutil.rmtree(out, ignore_errors=True)


def _read(scored: Reference) -> list[dict[str, Any]]:
    from models.files import jsonl

    return list(jsonl.read(scored.path / "train.jsonl"))


def _rescore(scored: Reference, values: list[float]) -> None:
    from models.files import jsonl

    ends = zip(values[::2], values[1::2], strict=True)
    rows = [
        row | {"ref_chosen_logps": a, "ref_rejected_logps": b} for row, (a, b) in zip(_read(scored), ends, strict=True)
    ]
    jsonl.write(scored.path / "train.jsonl", rows)


# Kernels


def attention(tell: Tell, folder: Path, tiny: bool) -> None:
    """Time each attention kernel, forward and backward, causal and with the mask of a shared prompt; torch alone."""
    import torch
    from torch.nn.attention import SDPBackend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, heads, width = (2, 4, 64) if tiny else (16, 32, 768)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (
            torch.randn(rows, heads, width, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        mask = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        mask[2 * width // 3 :, width // 3 : 2 * width // 3] = False
        for masked in (False, True):
            for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                            SDPBackend.CUDNN_ATTENTION):  # fmt: skip
                name = f"{str(dtype)[6:]}, {'shared-prompt mask' if masked else 'causal'}, {backend.name.lower()}"
                with tell.stage(name) as facts:
                    options = {"attn_mask": mask} if masked else {"is_causal": True}
                    facts["ms"] = _attend(q, k, v, backend, options)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Any, options: dict[str, Any]) -> Any:
    """Return the milliseconds of forward and backward, or why the kernel refuses."""
    import time

    import torch
    from torch.nn.attention import sdpa_kernel

    times = []
    try:
        for _ in range(8):
            if q.is_cuda:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).sum().backward()
            if q.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0]}"
    return round(1e3 * sorted(times)[len(times) // 2], 3)


def head(tell: Tell, folder: Path, shape: str, tiny: bool) -> None:
    """Say whether TRL's head runs in Triton, and compare its log-probs with its other path."""
    import torch
    from trl.kernels import chunked_logprob

    from models.alignment import reference
    from models.policy import logprobs, weights

    job = task(folder, shape, "lora")
    with tell.stage("TRL's head") as facts:
        model, tokenizer = weights.load(job.base, job.compute)
        rows = reference.tokenise(tokenizer, job.pairs.path / "train.jsonl", job.data.max_tokens)[0][:16]
        facts["triton"] = chunked_logprob._use_triton(torch.device(model.device))
        exact = [value for pair in logprobs.pair_logps(model, rows, tokenizer.pad_token_id) for value in pair]
        lengths = [len(row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]
        facts |= _gap(exact, trl_logps(model, rows, tokenizer.pad_token_id, False), lengths)


def profile(tell: Tell, folder: Path, shape: str, tiny: bool) -> None:
    """List what takes the time of training steps: ours, ours with a shared prompt, TRL's best."""
    import arms
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    on_gpu = torch.cuda.is_available()
    for name in ("ours", "shared", "best"):
        with tell.stage(f"kernels of {name}") as facts:
            job = task(folder, shape, "lora", updates=3)
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            with profiled(activities=kinds) as seen:
                arms.run(name, job, folder / f"profile-{name}")
            attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, attribute, 0))[:16]
            facts["top_ms"] = {row.key[:90]: round(getattr(row, attribute, 0) / 1e3, 1) for row in rows}


# Answers


def answers(tell: Tell, folder: Path, shape: str, tiny: bool) -> None:
    """Answer prompts in batches and one by one; the answers must be the same where nothing nearly ties."""
    from models.policy import generate, weights
    from models.policy.generate import Ask
    from models.recipe import Evaluation

    job = task(folder, shape, "lora")
    model, tokenizer = weights.load(job.base, job.compute)
    draw, count, longest = Random(1), *((4, 8) if tiny else (128, 64))
    asked = [Ask(" ".join(f"w{draw.randrange(3, 500)}" for _ in range(draw.randint(8, 64)))) for _ in range(count)]
    found: dict[int, dict[int, Any]] = {}
    for batch in (count, 1):
        with tell.stage(f"batches of {batch}") as facts:
            import time

            some = asked if batch > 1 else asked[:8]
            begun = time.perf_counter()
            config = Evaluation(max_new_tokens=longest, batch=batch)
            found[batch] = dict(generate.answer(model, tokenizer, some, config, 0))
            facts["prompts_per_s"] = round(len(some) / (time.perf_counter() - begun), 2)
            alike = [found[batch][i].ids == found[count][i].ids for i in found[batch]]
            ties = sum(found[batch][i].tie >= 0 for i in found[batch])
            facts |= {"equal": f"{sum(alike)} of {len(alike)}", "near_ties": ties}
