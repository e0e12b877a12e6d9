"""Which prompts say nearly the same? The Jaccard overlap of word triples, so that no test prompt is trained on.

The comparison is exact. What is compared is found by the rarest triples of each prompt: of two sets that overlap by t
or more, the n − ⌈t·n⌉ + 1 first members of each, in one order of all, have one in common (Chaudhuri et al. 2006).
"""

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from zlib import crc32

from models.data.dialogue import Message

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of scripts that part no words: Thai, Lao, Burmese, Khmer, kana, and Han; each of them counts as a word."""
WORD = re.compile(rf"(?=\w)[{UNSPACED}]|[^\W{UNSPACED}]+")
ALONE = 3
"""Words, or twice as many letters of unspaced scripts, from which on a last turn says enough to be compared by itself:
`Hello` begins a thousand dialogues."""
BUCKETS = 2**20
"""Counters of how often triples occur: several share one, which costs time only."""
FAMILY = 100
"""A triple that so many different prompts share proposes no more of them: it belongs to how people ask, and a table of
prompts that overlap by a little less than the limit would take hours."""


def text_of(prompt: list[Message]) -> str:
    """Return the words that a user says in a prompt, in lower case, without punctuation: what splits follow.

    What the system or the assistant says in it makes no other question of it; a prompt without words is its signs.
    """
    content = " ".join(turn["content"] for turn in prompt if turn["role"] == "user").lower()
    # a prompt without words, as `?!` or `+ =`, is its signs: else all such prompts would count as one
    return " ".join(WORD.findall(content) or content.split())


def questions(prompt: list[Message]) -> list[str]:
    """Return what is looked for among prompts that are kept apart: all that a user says, and the last turn alone.

    The last turn is what is answered, so a question is the same question after other turns.
    """
    whole, last = text_of(prompt), text_of(prompt[-1:])
    # a letter of these scripts is a word for `WORD` but says less than one, so two of them count as one here
    words = sum(0.5 if re.match(f"[{UNSPACED}]", word) else 1 for word in last.split())
    return [whole, last] if last != whole and words >= ALONE else [whole]


class NearDuplicates:
    """Prompts that are kept apart from training, and the question whether another is one of them.

    Only these prompts are held in memory; the prompts that are asked about are not.
    """

    def __init__(self, prompts: Iterable[str], similarity: float) -> None:
        """Index prompts (as `text_of` returns them); `similarity` 1 compares the exact words only."""
        self.exact = set(prompts)
        self.index = None
        if similarity < 1:
            self.index = _Index(self.exact, similarity)
            for text in self.exact:
                self.index.add(text)

    def asks(self, prompt: list[Message]) -> bool:
        """Return whether this prompt, or the last turn of it, is one that is kept apart, or nearly one."""
        return any(map(self.contains, questions(prompt)))

    def contains(self, text: str) -> bool:
        """Return whether this text, or nearly this text, is kept apart."""
        return text in self.exact or (self.index is not None and self.index.find(text) >= 0)


def leaders(prompts: Sequence[str], similarity: float) -> list[int]:
    """Return for each prompt the first of its family: of the first prompt before it that it nearly repeats.

    Its own place if it repeats none. Two families stay two where a later prompt repeats both, so that adding prompts at
    the end changes nothing for those before (but where more than FAMILY share their rarest triples).

    Args:
        prompts: as `text_of` returns them, in the order of their file.
        similarity: least Jaccard overlap of word triples, above 0.
    """
    index = _Index(prompts, similarity)
    leader_of: list[int] = []
    for place, text in enumerate(prompts):
        # searched before it is added, so that a prompt is near to those before it only, and never to itself
        near = index.find(text, most=FAMILY)
        index.add(text)
        leader_of.append(place if near < 0 else leader_of[near])
    return leader_of


class _Index:
    """Prompts by their rarest triples."""

    def __init__(self, counted: Iterable[str], similarity: float) -> None:
        """Count the triples of these prompts; none of them is in the index yet."""
        self.similarity = similarity
        self.texts: list[str] = []
        self.holders: dict[str, list[int]] = {}
        self.counts = array("L", bytes(array("L").itemsize * BUCKETS))
        for text in counted:
            for triple in _triples(text):
                self.counts[_bucket(triple)] += 1

    def add(self, text: str) -> None:
        """Take a prompt into the index."""
        for triple in self._rarest(text):
            self.holders.setdefault(triple, []).append(len(self.texts))
        self.texts.append(text)

    def find(self, text: str, most: int = 0) -> int:
        """Return the number of the first prompt added that this one nearly repeats; −1 if there is none.

        Args:
            most: prompts that one triple may propose; 0 means all.
        """
        triples = _triples(text)
        proposed = {i for triple in self._rarest(text) for i in self.holders.get(triple, ())[: most or None]}
        # the counters only say which prompts to compare; what is near is decided by the exact overlap
        return next((i for i in sorted(proposed) if _jaccard(triples, _triples(self.texts[i])) >= self.similarity), -1)

    def _rarest(self, text: str) -> list[str]:
        """Return the triples of which a near prompt has one among its own."""
        triples = _triples(text)
        # equal counts are ordered by the triple itself: the method needs one and the same order for all prompts
        ordered = sorted(triples, key=lambda triple: (self.counts[_bucket(triple)], triple))
        # 1e-9: in floating point 0.28 · 25 is a little more than 7, ⌈t·n⌉ would be 8, and the list one too short
        return ordered[: len(triples) - math.ceil(self.similarity * len(triples) - 1e-9) + 1]


def _bucket(triple: str) -> int:
    # not hash(), which Python salts in each process: where FAMILY limits, the order of triples can decide what is near
    return crc32(triple.encode()) % BUCKETS


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


@lru_cache(maxsize=4096)
def _triples(text: str) -> frozenset[str]:
    """Return the runs of three words; a prompt of fewer words is one run."""
    words = text.split()
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))
