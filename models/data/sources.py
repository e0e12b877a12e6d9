"""The files that a run starts from: the user's own, named by content, or the embedded town's."""

from collections.abc import Collection, Iterator
from pathlib import Path

from models.artifacts import Sources, content_digest
from models.data import readers, suites, town
from models.data.dialogue import Message, messages
from models.data.preferences import split_of
from models.errors import BadData
from models.files import jsonl
from models.files.hub import local
from models.recipe import Assessment, Data, Recipe
from models.recipe.places import TOWN
from models.stage import stage
from models.words import counted

HALF = Data(test=0.5, validation=0.0)
"""Divides a suite: half of its prompts test, the others choose."""


def places_of(recipe: Recipe | Assessment) -> dict[str, str]:
    """Return role → file path or `town`, for everything that the recipe reads."""
    roles = {f"steps.{k}": step.data for k, step in enumerate(recipe.steps)} if isinstance(recipe, Recipe) else {}
    roles |= {f"suite/{role}": place for role, place in recipe.evaluation.suites if place}
    roles |= {f"labels/{metric}": judge.labels for metric, judge in recipe.evaluation.judges if judge.labels}
    return roles | ({"sft": recipe.sft.data} if isinstance(recipe, Recipe) and recipe.sft.data else {})


def digests(recipe: Recipe | Assessment) -> dict[str, str]:
    """Return role → what names its content, for all that the recipe reads: what makes a run the same run."""
    return {role: digest(role, place) for role, place in places_of(recipe).items()}


def digest(role: str, place: str) -> str:
    """Return the sha256 of the user's data, or `town` and its version.

    Raises:
        BadData: the file does not exist or cannot be read.
    """
    if place == TOWN:
        return f"{TOWN} {town.VERSION}"
    try:
        return readers.digest(local(place, "dataset"))
    except BadData as error:
        raise BadData(f"{key_of(role)}: {error}") from error


def key_of(role: str) -> str:
    """Return the recipe's key that names the file with this role."""
    kind, _, name = role.partition("/")
    return {"suite": f"evaluation.suites.{name}", "labels": f"evaluation.judges.{name}.labels"}.get(
        kind, f"{role}.data"
    )


@stage("sources.gather", version=6)
def gather(out: Path, files: dict[str, str], sha256: dict[str, str], seed: int, halves: bool = True) -> Sources:
    """Write the town's files where it is asked for, and name the user's files by content.

    Args:
        files: role → path, or `town`.
        sha256: role → digest that the file had when the run was planned; other keys are kept for the report.
        halves: half of each suite chooses and half tests; else all of it tests.

    Raises:
        BadData: a file changed since then.
    """
    written = town.write(out, seed) if TOWN in files.values() else {}
    # the town's suites come with its data, whether or not the recipe names them; a suite of the user's replaces its own
    places = {role: written[role] for role in written if role.startswith("suite/")}
    incidents = _incidents(files)
    for role, place in files.items():
        if place == TOWN and role.startswith("suite/"):
            continue
        if place == TOWN:
            # one file holds the comparisons of both steps, as PKU-SafeRLHF does: each of its rows has both labels
            places[role] = written["sft" if role == "sft" else "helpful"]
            continue
        path = local(place, "dataset").resolve()
        if readers.digest(path) != sha256[role]:
            raise BadData(f"{role} {place!r}: the file changed while the run was starting; start again")
        places |= _split(role, path, halves, incidents, out) if role.startswith("suite/") else {role: str(path)}
    # relative to `out` where a file was written there, absolute otherwise: `out / place` is right for both
    content = content_digest({role: readers.digest(out / place) for role, place in places.items()})
    return Sources(path=out, digest=content, files=places, sha256=sha256)


def oddities(files: dict[str, str], halves: bool = True) -> Iterator[str]:
    """Yield what is odd about the user's files, a sentence each: prompts that repeat others, files that are not read.

    Args:
        files: role → path.
        halves: half of each suite chooses.

    Raises:
        BadData: one cannot be read.
    """
    must_pass = _incidents(files) if halves else set()
    for role, place in files.items():
        if place == TOWN:
            continue
        path = local(place, "dataset")
        if unread := readers.unread_files(path):
            more = ", …" if len(unread) > 3 else ""
            yield (
                f"{role}: {path}: {counted(len(unread), 'file')} not read, since others are named train or the type is "
                f"not known: {', '.join(unread[:3])}{more}"
            )
        if len(parts := readers.folders(path)) > 1:
            yield f"{role}: {path}: {', '.join(parts[:5])} are read as one; give one of them if they differ in kind"
        kind, _, name = role.partition("/")
        # a step's data card counts the rows of other splits, so they are named here for the other roles only
        if not role.startswith("steps.") and (others := readers.count_unread_rows(path)):
            yield f"{role}: {path}: {counted(others, 'row')} not used, since only those of train are"
        if must_pass and kind == "suite" and name != suites.MUST_PASS:
            both = must_pass & {suites.prompt_digest(row["prompt"]) for row in suites.read(path, name)}
            if both:
                shared = f"{counted(len(both), 'prompt')} stand in {suites.MUST_PASS} too"
                yield f"suite {name}: {shared}: they help to choose, and do not test"
        if kind == "suite":
            yield from (f"suite {name}: {sentence}" for sentence in suites.oddities(path, name))


def prompts(role: str, path: Path) -> list[suites.SuitePrompt]:
    """Return the prompts of the user's suite for a role.

    Raises:
        BadData: there is none, or a row cannot be used; the sentence begins with the recipe's key.
    """
    try:
        return suites.read(path, role)
    except BadData as error:
        raise BadData(f"{key_of(f'suite/{role}')}: {error}; mend the file, or leave the suite out") from error


def tests(prompts: list[str | list[Message]], incidents: Collection[str] = ()) -> list[bool]:
    """Return which prompts of a suite test; the others choose.

    It follows from the prompt alone, but a prompt that nearly repeats one before it stands where that one does, and one
    that must pass chooses: as an incident it already helps to choose, and what chose a policy does not test it.

    Args:
        incidents: digests of the prompts that must pass.
    """
    in_test = [split_of(messages(prompt), HALF) == "test" for prompt in prompts]
    leaders = suites.families(prompts)
    # a whole family goes with its first prompt: near copies on both sides would let the choice see the test
    choosing = {leaders[i] for i, prompt in enumerate(prompts) if suites.prompt_digest(prompt) in incidents}
    return [in_test[leader] and leader not in choosing for leader in leaders]


def _incidents(files: dict[str, str]) -> set[str]:
    """Return the digests of the user's prompts that must pass."""
    place = files.get(f"suite/{suites.MUST_PASS}", "")
    if place in ("", TOWN):
        return set()
    return {suites.prompt_digest(row["prompt"]) for row in prompts(suites.MUST_PASS, local(place, "dataset"))}


def _split(role: str, path: Path, halves: bool, incidents: Collection[str], out: Path) -> dict[str, str]:
    """Write the validation and the test half of a user's suite.

    Incidents are asked on both splits: each of them must pass, and none of them measures a rate.
    """
    parts: dict[str, list[suites.SuitePrompt]] = {"validation": [], "test": []}
    kind = role.removeprefix("suite/")
    rows = prompts(kind, path)
    is_divided = halves and kind != suites.MUST_PASS
    in_test = tests([row["prompt"] for row in rows], incidents) if is_divided else [True] * len(rows)
    for row, tested in zip(rows, in_test, strict=True):
        for part in parts if kind == suites.MUST_PASS else (("test",) if tested else ("validation",)):
            parts[part].append(row)
    files = {f"{role}/{part}": f"{role.replace('/', '-')}-{part}.jsonl" for part in parts}
    for half, half_rows in parts.items():
        jsonl.write(out / files[f"{role}/{half}"], half_rows)
    return files
