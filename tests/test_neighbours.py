"""Near-duplicates: the documented rule is an exact one, so what it says is what is dropped."""

import time
from random import Random

import pytest

from models.neighbours import Neighbourhood, leaders

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
    apart = Neighbourhood([" ".join(words) for words in held], similarity)
    asked = [(words, edited(words, draw, times=round(10 * (1 - similarity)))) for words in held]
    near = [text for words, text in asked if similarity <= overlap(" ".join(words), text) < similarity + 0.1]
    far = [text for words, text in asked if overlap(" ".join(words), text) < similarity]
    assert len(near) > 50 and not [text for text in far if apart.holds(text)]
    assert sum(apart.holds(text) for text in near) / len(near) > 0.99


def test_a_similarity_of_one_compares_the_exact_words() -> None:
    apart = Neighbourhood(["how do i clean my lamp"], 1)
    assert apart.holds("how do i clean my lamp") and not apart.holds("how do i clean my lamp now")
    assert not Neighbourhood([], 0.8).holds("how do i clean my lamp")


def test_a_prompt_follows_the_first_that_it_nearly_repeats() -> None:
    draw = Random(1)
    first = [" ".join(draw.choices(WORDS, k=30)) for _ in range(50)]
    again = [f"{text} {draw.choice(WORDS)}" for text in first]
    assert leaders([*first, *again], 0.8) == [*range(50), *range(50)]
    assert leaders([*first, *again][:70], 0.8) == [*range(50), *range(20)]
    assert leaders([], 0.8) == []


def test_many_prompts_of_one_wrapper_take_no_time() -> None:
    """Each pair of them overlaps by 0.7, so that all would be compared with all."""
    draw = Random(2)
    prompts = [" ".join([*WORDS[:30], *draw.choices(WORDS, k=6)]) for _ in range(4000)]
    started = time.perf_counter()
    assert leaders(prompts, 0.8) == [*range(4000)]
    assert time.perf_counter() - started < 30
