"""Near-duplicates: the documented rule is an exact one, so what it says is what is dropped."""

from random import Random

import pytest

from models.neighbours import Neighbourhood

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
