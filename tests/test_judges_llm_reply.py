"""What a chat model is asked, and what of its reply counts: nothing that an answer could have held."""

from pathlib import Path
from string import Template

import pytest

from models.judges.llm import Llm, Question, Reply, fill_rubric, read_grades, redacted
from models.judges.protocol import LLM_VERSION, AnsweredPrompt, Grade
from models.judges.score_cache import ScoreCache
from models.recipe import Judge


def test_every_fence_is_of_its_own_texts() -> None:
    rubric = Template("$fence $prompt $fence $first $fence $second $fence")
    texts = [("a\nb", "c", "d"), ("a", "b\nc", "d"), ("a", "b", "c\nd"), ("a", "c", "b\nd"), ("a", "b\nc\nd", "")]
    assert len({fill_rubric(rubric, 2, 0, *one).fence for one in texts}) == len(texts)
    question = fill_rubric(rubric, 2, 0, *texts[0])
    assert question == fill_rubric(rubric, 2, 0, *texts[0])  # what was judged is found again
    assert question.text.count(question.fence) == 4 and len(question.fence) == 33


def test_verdicts_of_the_rubric_without_a_key_are_not_used_again() -> None:
    """`judging.judge` and the table go by this version; the old one was 1."""
    assert LLM_VERSION > 1


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("bad key sk-very-secret.", "bad key (key)."),
        ("sk-very-secretsk-very-secret", "(key)"),
        ("sk-v ery- secr et", "(key) (key) (key) et"),
        ("it begins with sk-ve and ends with cret", "it begins with (key) and ends with (key)"),
        ("every secret", "e(key) (key)"),
        ("sk- sec ret", "sk- sec ret"),
        ("", ""),
    ],
)
def test_no_four_characters_in_a_row_are_those_of_the_key(text: str, left: str) -> None:
    assert redacted(text, "sk-very-secret") == left
    assert redacted(text, "") == text


def test_a_short_key_is_hidden_as_a_whole() -> None:
    assert redacted("an ab in a cab", "ab") == "an (key) in a c(key)"


@pytest.mark.parametrize(
    ("text", "grades"),
    [
        ('{"#f": {"first": 6, "second": 3}}', (6, 3)),
        (' {"#f": {"second": 3.5, "first": 6}}\n', (6, 3.5)),
        ('```json\n{"#f": {"first": 6, "second": 3}}\n```', (6, 3)),
        ('{"first": 6, "second": 3}', None),
        ('{"#e": {"first": 6, "second": 3}}', None),
        ('{"f": {"first": 6, "second": 3}}', None),
        ('{"#f": {"first": 6, "second": 3}, "#e": {"first": 6, "second": 3}}', None),
        ('{"#f": {"first": 6, "second": 3}, "#f": {"first": 3, "second": 6}}', None),
        ('{"#f": {"first": 6, "second": 3, "first": 1}}', None),
        ('{"#f": [6, 3]}', None),
        ('{"#f": 6}', None),
        ("6 3", None),
        ("6, 3.5", None),
        ('{"#f": {"first": 6}}', None),
        ('{"#f": {"first": 6, "second": 3, "why": "x"}}', None),
        ('{"#f": {"first": "6", "second": 3}}', None),
        ('{"#f": {"first": true, "second": 3}}', None),
        ('{"#f": {"first": NaN, "second": 3}}', None),
        ('{"#f": {"first": 0, "second": 3}}', None),
        ('{"#f": {"first": 1e400, "second": 3}}', None),
        ('I say {"#f": {"first": 6, "second": 3}}', None),
        ("", None),
        ("[" * 3000, None),
        ('{"#f":' * 3000, None),
        ('{"#f": {"first": ' + "9" * 5000 + ', "second": 3}}', None),
    ],
)
def test_only_what_was_asked_for_is_read(text: str, grades: tuple[float, ...] | None) -> None:
    assert read_grades(text, "#f", 2) == grades


def test_one_grade_stands_under_the_fence_itself() -> None:
    grades = {
        text: read_grades(text, "#f", 1)
        for text in ('{"#f": 9}', '{"#f": {"first": 9}}', '{"first": 9}', "9", '{"#f": [9]}')
    }
    assert [*grades.values()] == [(9,), None, None, None, None]


def test_a_verdict_of_several_repeats_fails_with_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges decline on harmful answers more than on harmless ones: what they leave would say that all is well."""
    judge = Judge.model_validate({"kind": "llm", "model": "m", "base_url": "http://127.0.0.1:9/v1", "repeats": 3})
    table = ScoreCache(tmp_path / "v.db", "judge")

    def asked(self: Llm, questions: list[Question]) -> dict[Question, Reply]:
        return {q: Reply(failed="declined") if q.repeat == 1 else Reply((9.0,) * q.grades) for q in questions}

    monkeypatch.setattr(Llm, "_ask", asked)
    assert list(Llm(judge, "harmless", table).grade([AnsweredPrompt("q", "a")])) == [Grade(failed="declined")]
    (compared,) = Llm(judge, "helpful", table).compare([(AnsweredPrompt("q", "a"), "b")])
    assert compared.failed == "declined" and len(compared.calls) == 4
