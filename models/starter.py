"""A first recipe for a user's data: what the files show is filled in, and what only the user knows is a comment."""

import json
import os
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from models.data.fields import Fields
from models.data.formats import Format, example, format_of
from models.data.readers import rows
from models.errors import BadInput, BadPlace, BadPolicy
from models.files.jsonl import Row
from models.files.raw_rows import Unusable
from models.metrics.statistics import enough_prompts, fewest_prompts
from models.recipe import Constraint
from models.recipe.places import is_local
from models.words import counted

SEEN = 200
"""Rows of a file that are read here; `sacpo check` reads all."""
PLACEHOLDERS = {"base": "my-model", "helpful": "helpful.jsonl", "harmless": "harmless.jsonl"}
REFERENCE = ("reference = base, KL weight β", "reference = the policy of the step before, KL weight β/λ")
LAMBDA = """\
lambda = [0.5, 1, 2]                   # one policy per value; β/λ = 0.2, 0.1, 0.05, where smaller is safer
"""
STEP = """
[[steps]]                              # {reference}
metric = "{metric}"
method = "{method}"
data = {data}{seen}
{label}{grid}adapter_rank = 16                      # LoRA on all linear layers; 0 trains all weights
learning_rate = 1e-4                   # with LoRA; 2e-5 or less without
epochs = 1
# pairs = 256                          # train on at most so many: for a first look
batch = 16                             # pairs per update
micro_batch = 8                        # of them in memory at once; smaller saves memory and costs time
"""
RECIPE = """\
# Made by `sacpo init`. `sacpo check {file}` shows what it will do, `sacpo run {file}` does it.
# Relative paths are seen from this file's folder. `sacpo keys` lists every key with its default and meaning.
name = "{name}"
base = {base}
beta = 0.1                             # KL weight of the first step: larger stays nearer to the base
{steps}{merge}
[data]
heldout = 256                          # held-out pairs per split and step that every candidate is weighed on
max_tokens = 512                       # longer pairs are left out and counted

[evaluation]
max_new_tokens = 256
batch = 8                              # prompts answered at once
kl_prompts = 16

[compute]
processes = 1                          # policies trained side by side
threads = 1                            # CPU threads of each; no more than idle cores

[constraint]                           # what a policy must show on harmful prompts before it is promoted
at_least = 0.9
confidence = 0.95

# Without what follows the run trains and registers, and promotes nothing: nobody has judged the answers.
# 1. Prompts, one JSON object per line with `prompt` (and `category`, if you like). None of them may be a training
#    prompt: `contaminated = "drop"` under [data] leaves such rows out of the training.
#    Half choose the candidate, half test it. To show 0.9 on harmful ones you need at least {fewest}, and about
#    {enough} for a policy that is 0.95 safe; `sacpo check` says what yours can show.
# 2. Judges. Open models with their whole setting stand in docs/evidence.md under "Who judges".
#
# [evaluation.suites]
# helpful = "suites/helpful.jsonl"
# harmless = "suites/harmful.jsonl"
#
# [evaluation.judges]
# helpful = {{ kind = "model", model = "a reward model: folder or hub id" }}
# harmless = {{ kind = "model", model = "a guard model: folder or hub id", label = "unsafe", better = "low", threshold = 0.5 }}
"""  # noqa: E501


class Seen(NamedTuple):
    """What the first rows of a file show."""

    words: str
    """The format, for people."""
    method: str = "dpo"
    label: str = ""
    """A line of the recipe that names the label's column; empty if none is needed."""


def write(path: Path, base: str, helpful: str, harmless: str) -> list[str]:
    """Write a recipe for a base and data; return a sentence for each file that was looked at.

    Args:
        path: where the recipe goes; must not exist.
        base: as in a recipe, but relative to the working directory; empty leaves a placeholder.
        helpful: file or hub id of comparisons for helpfulness; empty leaves the step out, or a placeholder if
            `harmless` is empty too.
        harmless: the same for harmlessness.

    Raises:
        BadPlace: the recipe exists already, or cannot be written.
        BadInput: base or data are not there, or of no known format.
    """
    if path.suffix != ".toml":
        raise BadInput(f"{path}: a recipe is a TOML file; give a name that ends in .toml")
    if path.exists():
        raise BadPlace(f"{path}: is there already and stays as it is; give another name")
    if base and is_local(base) and not Path(base).expanduser().exists():
        raise BadPolicy(f"base {base!r}: no such folder or GGUF file; give one, or a hub id (owner/name@revision)")
    data = {metric: place for metric, place in (("helpful", helpful), ("harmless", harmless)) if place}
    seen = {metric: inspect_data(metric, place) for metric, place in data.items()}
    text = _recipe(path, base, data or {metric: "" for metric in ("helpful", "harmless")}, seen)
    _put(path, text)
    return [f"{metric}: {data[metric]}: {look.words}; {look.method.upper()}" for metric, look in seen.items()]


def inspect_data(metric: str, place: str) -> Seen:
    """Return the format of a file of comparisons, and the method that fits it.

    Raises:
        BadData: there is no such file, it is empty, or of no known format.
    """
    if not is_local(place):
        return Seen("on a hub, looked at when it is fetched")
    path = Path(place).expanduser()
    first = [row for _, row in islice(rows(path), SEEN)]
    usable = [row for row in first if not isinstance(row, Unusable)]
    if not usable:
        raise BadInput(f"{path}: none of the first {counted(len(first), 'row')} can be read: {first[0]}")
    layout = format_of(Fields(usable[0], {}, metric, ""), str(path))
    method = "kto" if layout.unpaired else "dpo"
    reasons = [reason for row in usable if (reason := _unusable(row, layout, metric))]
    if len(reasons) < len(usable):
        return Seen(f"{layout.name}: one answer per row, good or bad" if layout.unpaired else layout.name, method)
    # No row can be used as it is, mostly since the column of the label has another name: the recipe gets a line for it
    columns = ", ".join(sorted(usable[0]))
    return Seen(f"not usable yet: {reasons[0]}", label=f'# label = "…"                          # one of: {columns}\n')


def _unusable(row: Row, layout: Format, metric: str) -> str:
    """Return why a row gives no pair; empty if it does."""
    try:
        example(Fields(row, {}, metric, ""), layout, not layout.unpaired)
    except Unusable as reason:
        return str(reason)
    return ""


def _recipe(path: Path, base: str, data: dict[str, str], seen: dict[str, Seen]) -> str:
    steps = ""
    for number, (metric, place) in enumerate(data.items()):
        look = seen.get(metric, Seen("← name your file of comparisons here"))
        steps += STEP.format(
            reference=REFERENCE[bool(number)],
            metric=metric,
            method=look.method,
            data=_toml(place or PLACEHOLDERS[metric], path),
            seen=f"  # {look.words}",
            label=look.label,
            grid=LAMBDA if metric == "harmless" else "",
        )
    bound = Constraint().shared
    merge = "\n[merge]\nweights = [0.5]                        # q·θ_safe + (1−q)·θ_reward, from the largest λ\n"
    return RECIPE.format(
        file=path.name,
        name=re.sub(r"[^a-z0-9.-]+", "-", path.stem.lower()).lstrip(".-") or "mine",
        base=_toml(base or PLACEHOLDERS["base"], path) + ("" if base else "  # ← a folder, a .gguf file or a hub id"),
        steps=steps,
        merge=merge if len(data) > 1 else "",
        fewest=2 * fewest_prompts(bound.at_least, bound.confidence),
        enough=2 * enough_prompts(0.95, bound.at_least, bound.confidence),
    )


def _toml(place: str, path: Path) -> str:
    """Return a place as TOML, relative to the recipe's folder if it lies below it."""
    if is_local(place) and place not in PLACEHOLDERS.values():
        whole, folder = Path(os.path.abspath(Path(place).expanduser())), Path(os.path.abspath(path)).parent
        place = str(whole.relative_to(folder) if whole.is_relative_to(folder) else whole)
    return json.dumps(place, ensure_ascii=False)


def _put(path: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, "utf-8")
        os.link(new, path)  # unlike a rename, it fails if the name was taken since `write` looked
    except FileExistsError as error:
        raise BadPlace(f"{path}: is there already and stays as it is; give another name") from error
    except OSError as error:
        raise BadPlace(f"{path}: cannot be written ({error.strerror}); give a place that can") from error
    finally:
        new.unlink(missing_ok=True)
