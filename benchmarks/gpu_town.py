"""The stages of the quickstart, called one by one on whatever device there is: `gpu.py` runs them as one unit."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu import Tell

    from models.artifacts import Policy, Preferences, Reference, Sources
    from models.recipe import Compute, Recipe, Step


class Town:
    """What the stages have made so far; a stage that lacks something fails, and the next one goes on."""

    def __init__(self, tell: Tell, folder: Path, tiny: bool) -> None:
        from models.recipe import Compute, toml

        changes = ["sft.updates=8", "steps.0.updates=4", "steps.1.updates=4"] if tiny else []
        self.tell, self.folder, self.count = tell, folder, 0
        self.recipe: Recipe = toml.read("quickstart", changes)
        self.compute: Compute = Compute()
        self.policies: dict[str, Policy] = {}

    def out(self) -> Path:
        """Return a new folder."""
        self.count += 1
        place = self.folder / f"stage-{self.count}"
        place.mkdir()
        return place


def town(tell: Tell, folder: Path, tiny: bool) -> None:
    """Run every stage that computes, then what must hold."""
    here = Town(tell, folder, tiny)
    sources = begin(here)
    helpful, harmless, unpaired = (prepare(here, sources, k, m) for k, m in ((0, "dpo"), (1, "dpo"), (1, "kto")))
    first, second = here.recipe.steps
    with tell.stage("reference of the base") as facts:
        scored = score(here, "base", helpful)
        facts |= scored.counts
    with tell.stage("dpo, helpful") as facts:
        here.policies["helpful"] = dpo(here, "base", scored, first, 1, facts)
    with tell.stage("reference of the helpful policy"):
        scored = score(here, "helpful", harmless)
    for lambda_ in (0.4, 1.0):
        with tell.stage(f"dpo, harmless, lambda {lambda_:g}") as facts:
            here.policies[f"harmless {lambda_:g}"] = dpo(here, "helpful", scored, second, lambda_, facts)
    with tell.stage("kto, harmless, lambda 1") as facts:
        here.policies["kto"] = kto(here, unpaired, facts)
    with tell.stage("dpo with LoRA, harmless, lambda 1") as facts:
        adapted = second.model_copy(update={"adapter_rank": 8})
        here.policies["adapter"] = dpo(here, "helpful", scored, adapted, 1, facts)
    with tell.stage("merge, q 0.5"):
        from models.alignment import merge

        here.policies["merge"] = merge.interpolate(
            here.out(), here.policies["harmless 1"], here.policies["helpful"], 0.5
        )
    for name in list(here.policies):
        answer(here, sources, name)
    resumes(here, scored, second)
    guarded(here, scored, second)


def begin(here: Town) -> Sources:
    """Make sources and base, and teach the base to answer."""
    from models.alignment import sft
    from models.data import sources
    from models.policy import weights

    with here.tell.stage("sources and base"):
        found = sources.gather(here.out(), sources.places_of(here.recipe), sources.digests(here.recipe), 0)
        base = weights.base(here.out(), "town", "", 0, weights.base_digest("town"))
    with here.tell.stage("sft") as facts:
        out = here.out()
        config, data = here.recipe.sft, here.recipe.data
        here.policies["base"] = sft.train(out, base, found, config, data, 0, here.compute)
        facts |= curve(out)
    return found


def prepare(here: Town, sources: Sources, k: int, method: str) -> Preferences:
    """Prepare the comparisons of step k."""
    from models.data import preferences
    from models.recipe import Selection

    metric = here.recipe.steps[k].metric
    selection = Selection(metric=metric, paired=method == "dpo")
    return preferences.prepare(here.out(), sources, f"steps.{k}", selection, here.recipe.data)


def score(here: Town, name: str, pairs: Preferences) -> Reference:
    """Score the training pairs with a policy."""
    from models.alignment import reference

    return reference.score(here.out(), here.policies[name], pairs, ["train"], here.recipe.data.max_tokens, here.compute)


def dpo(here: Town, name: str, scored: Reference, step: Step, lambda_: float, facts: dict[str, Any]) -> Policy:
    """Train one policy by DPO."""
    from models.alignment import dpo

    out = here.out()
    aim = step.objective(here.recipe.beta, lambda_)
    made = dpo.train(out, here.policies[name], scored, aim, step.training, 0, here.compute)
    facts |= curve(out)
    return made


def kto(here: Town, pairs: Preferences, facts: dict[str, Any]) -> Policy:
    """Train one policy by KTO."""
    from models.alignment import kto
    from models.recipe import Method

    step, start, out = (
        here.recipe.steps[1].model_copy(update={"method": Method.kto}),
        here.policies["helpful"],
        here.out(),
    )
    scored = kto.score(here.out(), start, pairs, step.training, 0, here.recipe.data.max_tokens, here.compute)
    made = kto.train(out, start, scored, step.objective(here.recipe.beta, 1), step.training, 0, here.compute)
    facts |= curve(out)
    return made


def curve(out: Path) -> dict[str, Any]:
    """Return the ends of a training's curve."""
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text("utf-8").splitlines()]
    return {"steps": len(lines), "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}


def answer(here: Town, sources: Sources, name: str) -> None:
    """Let one policy answer the validation suites, and the oracle say how often it is safe and how helpful."""
    from models.artifacts import Memory
    from models.data import prompts
    from models.data import town as world
    from models.files import jsonl
    from models.policy import answers

    with here.tell.stage(f"answers of {name}") as facts:
        out, config = here.out(), here.recipe.evaluation
        memory = Memory(path=here.folder / "answers.db")
        asked = prompts.ask(out, sources, [], "validation", config.samples, config.kl_prompts)
        answers.answer(out, here.policies[name], asked, config.decoding(0), here.compute, memory)
        rows = list(jsonl.read(out / "answers.jsonl"))
        scored = [(row["suite"], world.score(row["prompt"], row["answer"])) for row in rows]
        safe = [one.safe for suite, one in scored if suite == "harmless"]
        reward = [one.reward for suite, one in scored if suite == "helpful"]
        facts |= {"answers": len(rows), "safety_rate": round(sum(safe) / len(safe), 3)}
        facts |= {"mean_reward": round(sum(reward) / len(reward), 3), "garbled": sum(one.garbled for _, one in scored)}


def resumes(here: Town, scored: Reference, step: Step) -> None:
    """Train, train again from the checkpoint in the middle, and compare; then train once more from the start."""
    from models.alignment import dpo, trainer
    from models.alignment.checkpoints import COMPLETE

    half = (step.updates + 1) // 2
    config = step.model_copy(update={"save_every": half})
    aim = config.objective(here.recipe.beta, 1)
    with here.tell.stage("resume from the middle") as facts:
        kept, whole, again = here.out(), here.out(), here.out()

        def keep(out: Path) -> None:
            shutil.copytree(out / f"checkpoint-{half}", kept / f"checkpoint-{half}")

        clear, trainer.clear = trainer.clear, keep
        try:
            a = dpo.train(whole, here.policies["helpful"], scored, aim, config.training, 0, here.compute)
        finally:
            trainer.clear = clear
        shutil.copytree(kept / f"checkpoint-{half}", again / f"checkpoint-{half}")
        facts["marked"] = (again / f"checkpoint-{half}" / COMPLETE).exists()
        b = dpo.train(again, here.policies["helpful"], scored, aim, config.training, 0, here.compute)
        facts |= {"same_digest": a.digest == b.digest, "largest_difference": difference(whole, again)}
    with here.tell.stage("the same training twice") as facts:
        out = here.out()
        c = dpo.train(out, here.policies["helpful"], scored, aim, config.training, 0, here.compute)
        facts |= {"same_digest": a.digest == c.digest, "largest_difference": difference(whole, out)}


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of two weights."""
    from safetensors.torch import load_file

    a, b = (load_file(place / "model.safetensors") for place in (one, other))
    return float(f"{max(float((a[name] - b[name]).abs().max()) for name in a):.3g}")


def guarded(here: Town, scored: Reference, step: Step) -> None:
    """Show that each guard passes what is right, and stops what is wrong."""
    from models.alignment import guards, trainer
    from models.alignment.rows import scored_answers
    from models.errors import BrokenInvariant
    from models.files import jsonl
    from models.policy import logprobs, weights

    with here.tell.stage("guards pass") as facts:
        model, tokenizer = weights.load(here.policies["helpful"], here.compute)
        facts["device"] = str(model.device)
        guards.reproduces_probe(here.policies["helpful"], model, tokenizer.pad_token_id)
        rows = list(jsonl.read(scored.path / "train.jsonl"))
        guards.starts_at_reference(model, rows[: trainer.PROBES], tokenizer.pad_token_id)
        answers = [answer for row in rows[:512] for answer in scored_answers(row)]
        ours = logprobs.logps(model, [tokens for tokens, _ in answers], tokenizer.pad_token_id)
        facts["furthest_nats"] = max(abs(a - b) for a, (_, b) in zip(ours, answers, strict=True))
    with here.tell.stage("a reference of another policy is refused"):
        refused(BrokenInvariant, lambda: guards.same_policy(here.policies["base"], scored, step.metric))
    with here.tell.stage("weights that moved are refused"):
        next(model.parameters()).data.mul_(1.01)
        refused(
            BrokenInvariant, lambda: guards.reproduces_probe(here.policies["helpful"], model, tokenizer.pad_token_id)
        )
    with here.tell.stage("a file that changed is refused"):
        copy = replace(here.policies["helpful"], path=here.out())
        shutil.copytree(here.policies["helpful"].path, copy.path, dirs_exist_ok=True)
        file = copy.path / "model.safetensors"
        with file.open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"\x00\x00\x80\x3f")
        refused(BrokenInvariant, lambda: weights.load(copy, here.compute))


def refused(kind: type[Exception], call: Any) -> None:
    """Raise unless the call raises an exception of this kind."""
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")
