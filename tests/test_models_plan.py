"""What `sacpo check` foretells."""

import json
from pathlib import Path

from models.data.sources import tests as in_test_half
from models.plan import plan
from models.recipe.toml import assessment, read


def test_the_bound_of_a_recipe_is_tried_on_its_own_suites(tmp_path: Path) -> None:
    """`--like` once took the town's in their place where a judge is its oracle."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "how do i open it ?"}\n')
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'name = "mine"\nbase = "town"\n[[steps]]\nmetric = "harmless"\ndata = "town"\n'
        '[evaluation.suites]\nharmless = "mine.jsonl"\n[evaluation.judges]\nharmless = { kind = "oracle" }\n'
    )
    found = assessment(["town"], str(recipe), []).evaluation.suites
    assert found.harmless == str(tmp_path / "mine.jsonl") and found.helpful == "town"


def test_nothing_is_foretold_of_a_suite_that_is_not_there(tmp_path: Path) -> None:
    found = plan(read("quickstart", ["evaluation.suites.harmless=nowhere.jsonl"]), tmp_path / "kept")
    assert "nowhere.jsonl: no such data file" in found.errors[0] and not found.evidence and not found.judging


def test_answers_and_calls_of_a_chat_judge_are_foretold(tmp_path: Path) -> None:
    """Counted by hand: base, helpful, two of the safety step; all but the base compared with two others, twice each."""
    prompts_of = {"helpful": [f"how do i clean my lamp {i} ?" for i in range(30)], "harmless": ["how do i open it ?"]}
    prompts_of["harmless"] += [f"how do i open lock {i} ?" for i in range(20)]
    prompts_of["over_refusal"] = [f"how do i open my own lamp {i} ?" for i in range(10)]
    settings = ["steps.1.lambda=[1,2]", "merge.weights=[]", "evaluation.answers=2"]
    settings += ["evaluation.temperature=1.0", "evaluation.judges.over_refusal.kind=none", "gate.anchor=town"]
    validation, test = {}, {}
    for role, prompts in prompts_of.items():
        path = tmp_path / f"{role}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        settings.append(f"evaluation.suites.{role}={path}")
        test[role] = sum(in_test_half(prompts))
        validation[role] = len(prompts) - test[role]
    settings.append("evaluation.judges.harmless.threshold=6")
    for name, value in {"kind": "llm", "model": "gpt", "base_url": "http://127.0.0.1:9/v1", "repeats": 3}.items():
        settings += [f"evaluation.judges.{role}.{name}={value}" for role in ("helpful", "harmless")]
    answers, helpful, harmless = plan(read("quickstart", settings), tmp_path / "kept").judging
    settings.remove("gate.anchor=town")  # the first champion is the anchor then
    assert plan(read("quickstart", settings), tmp_path / "kept").judging == [answers, helpful, harmless]
    assert answers.startswith(
        f"{4 * sum(validation.values()) * 2:,} answers of up to 18 tokens by 4 policies, and at most"
    )
    assert answers.endswith(
        f" {4 * sum(test.values()) * 2:,} to test prompts"
    )  # with the base, the champion, the anchor
    each = 2 * 3  # answers to a prompt, repeats of a question
    compared = {role: (3 * 2 * 2 * validation[role] + 3 * 2 * test[role]) * each for role in ("helpful", "harmless")}
    assert helpful.startswith(f"helpful by gpt: at most {compared['helpful']:,} calls and about ")
    graded = (4 * validation["harmless"] + test["harmless"]) * each
    assert harmless.startswith(f"harmless by gpt: at most {compared['harmless'] + graded:,} calls and about ")
