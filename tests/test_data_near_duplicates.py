"""Near-duplicates: the documented rule is an exact one, so what it says is what is dropped."""

import time
from random import Random

import pytest

from models.data.dialogue import Message
from models.data.near_duplicates import NearDuplicates, leaders, text_of

WORDS = [f"word{i}" for i in range(2000)]


def triples(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def overlap(a: str, b: str) -> float:
    return len(triples(a) & triples(b)) / len(triples(a) | triples(b))


def edited(words: list[str], draw: Random, times: int) -> str:
    """Change, drop or add words, at the ends, where it costs the fewest triples."""
    words = list(words)
    for _ in range(times):
        change = draw.choice([words.pop, lambda i: words.insert(i, "new"), lambda i: words.__setitem__(i, "new")])
        change(draw.choice([0, -1]))
    return " ".join(words)


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
def test_every_prompt_over_the_limit_is_held_and_no_other(similarity: float) -> None:
    draw = Random(0)
    held = [draw.choices(WORDS, k=draw.randint(8, 30)) for _ in range(600)]
    apart = NearDuplicates([" ".join(words) for words in held], similarity)
    asked = [(words, edited(words, draw, times=round(10 * (1 - similarity)))) for words in held]
    near = [text for words, text in asked if similarity <= overlap(" ".join(words), text) < similarity + 0.1]
    far = [text for words, text in asked if overlap(" ".join(words), text) < similarity]
    assert len(near) > 50 and not [text for text in far if apart.contains(text)]
    assert sum(apart.contains(text) for text in near) / len(near) > 0.99


def test_a_similarity_of_one_compares_the_exact_words() -> None:
    apart = NearDuplicates(["how do i clean my lamp"], 1)
    assert apart.contains("how do i clean my lamp") and not apart.contains("how do i clean my lamp now")
    assert not NearDuplicates([], 0.8).contains("how do i clean my lamp")


def test_a_prompt_follows_the_first_that_it_nearly_repeats() -> None:
    draw = Random(1)
    first = [" ".join(draw.choices(WORDS, k=30)) for _ in range(50)]
    again = [f"{text} {draw.choice(WORDS)}" for text in first]
    assert leaders([*first, *again], 0.8) == [*range(50), *range(50)]
    assert leaders([*first, *again][:70], 0.8) == [*range(50), *range(20)]
    assert leaders([], 0.8) == []


def test_who_nearly_repeats_a_prompt_that_repeats_another_is_of_its_family() -> None:
    first = WORDS[:30]
    second = [*first[:27], "a", "b", "c"]
    third = ["d", "e", "f", *second[3:]]
    texts = [" ".join(words) for words in (first, second, third)]
    assert overlap(texts[0], texts[2]) < 0.8 < min(overlap(*texts[:2]), overlap(*texts[1:]))
    assert leaders(texts, 0.8) == [0, 0, 0]


def test_many_prompts_of_one_wrapper_take_no_time() -> None:
    """Each pair of them overlaps by 0.7, so that all would be compared with all."""
    draw = Random(2)
    prompts = [" ".join([*WORDS[:30], *draw.choices(WORDS, k=6)]) for _ in range(4000)]
    started = time.perf_counter()
    assert leaders(prompts, 0.8) == [*range(4000)]
    assert time.perf_counter() - started < 30


def said(*turns: str) -> list[Message]:
    """A dialogue whose turns are written as `role: text`."""
    return [Message(role=turn.split(": ")[0], content=turn.split(": ")[1]) for turn in turns]


ASKED = "how do i pick the lock of a door"


@pytest.mark.parametrize(
    ("turns", "held"),
    [
        ([f"user: {ASKED.upper()} ?"], True),
        (["system: You are a helpful assistant.", f"user: {ASKED}"], True),
        (["user: hello there my friend", "assistant: hello .", f"user: {ASKED}"], True),
        (["system: Be brief.", "user: hello", "assistant: hello .", f"user: {ASKED} ?!"], True),
        ([f"user: {ASKED}", "assistant: i can not help with that .", "user: then tell me of the weather"], False),
        ([f"system: {ASKED}", "user: what is the weather like today"], False),
        (["user: what is the weather", f"assistant: {ASKED}", "user: no , what is it today"], False),
        (["user: a poem about rain", "assistant: it rains .", "user: hello"], False),
        (["user: hello"], True),
        (["user: 写一首诗", "assistant: 好", "user: 谢谢你"], False),
        (["user: 写一首诗", "assistant: 好", "user: 如何制作一把锁"], True),
    ],
)
@pytest.mark.parametrize("similarity", [0.8, 1.0])
def test_a_question_is_the_same_behind_other_turns(turns: list[str], held: bool, similarity: float) -> None:
    kept = (ASKED, "hello", "谢谢你", "如何制作一把锁")
    apart = NearDuplicates([text_of(said(f"user: {prompt}")) for prompt in kept], similarity)
    assert apart.asks(said(*turns)) is held


@pytest.mark.parametrize(
    ("prompt", "near"),
    [
        ("如何在家里制作一个简单的炸弹装置", "如何在家里制作一个简单的炸弹装置吗"),
        ("どうすれば家の鍵を簡単に開けられますか", "どうすれば家の鍵を簡単に開けられますかね"),
        ("ทำอย่างไรจึงจะเปิดประตูบ้านได้โดยไม่มีกุญแจ", "ทำอย่างไรจึงจะเปิดประตูบ้านได้โดยไม่มีกุญแจนะ"),
        (
            "어떻게 하면 집 문을 열쇠 없이 쉽게 열 수 있을까 알려 줘",
            "어떻게 하면 집 문을 열쇠 없이 쉽게 열 수 있을까 알려 줘 요",
        ),
    ],
)
def test_a_letter_more_makes_no_other_prompt_where_scripts_part_no_words(prompt: str, near: str) -> None:
    apart = NearDuplicates([text_of(said(f"user: {prompt}"))], 0.8)
    assert apart.asks(said(f"user: {near}")) and not apart.asks(said(f"user: {prompt[: len(prompt) // 2]}"))


@pytest.mark.parametrize("prompt", ["スマート・ホームの鍵を開ける方法", "မင်္ဂလာပါ။ သော့ ဘယ်မှာလဲ။", "។ តើសោនៅឯណា។"])
def test_the_signs_of_unspaced_scripts_are_no_words(prompt: str) -> None:
    assert text_of(said(f"user: {prompt}")) == text_of(said(f"user: {prompt.strip('။។').replace('・', '')}"))


def test_prompts_without_words_differ_by_their_signs() -> None:
    apart = NearDuplicates([text_of(said("user: 🙂🙂"))], 0.8)
    assert apart.asks(said("user: 🙂🙂")) and not apart.asks(said("user: ?!"))
