"""Which prompts say nearly the same? The Jaccard overlap of word triples, so that no test prompt is trained on.

MinHash (Broder 1997) only proposes: what it proposes is compared exactly.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from datasketch import MinHash, MinHashLSH

from models.tokens import Message

PERMUTATIONS = 64
"""Hashes per prompt: the estimate of a similarity of 0.8 has a standard deviation of 0.05."""
LOOSER = 0.625
"""The index is asked for this share of the wanted similarity, since it misses half of what lies just above its own."""

EMPTY = MinHash(num_perm=PERMUTATIONS)
"""Copied for every prompt: making one draws the permutations again, which takes eight times as long."""


def text_of(prompt: list[Message]) -> str:
    """Return the words of a prompt, in lower case, without punctuation: what is compared, and what splits follow."""
    return " ".join(re.findall(r"\w+", " ".join(turn["content"] for turn in prompt).lower()))


class Neighbourhood:
    """Prompts that are kept apart from training, and the question whether another is one of them.

    Only these prompts are held in memory, about 5 kB each; the prompts that are asked about are not.
    """

    def __init__(self, prompts: Iterable[str], similarity: float) -> None:
        """Index prompts (as `text_of` returns them); `similarity` 1 compares the exact words only."""
        self.exact = set(prompts)
        self.index = None
        if similarity < 1:
            self.index = MinHashLSH(threshold=LOOSER * similarity, num_perm=PERMUTATIONS)
            self.similarity = similarity
            for text in self.exact:
                self.index.insert(text, _hash(text), check_duplication=False)

    def holds(self, text: str) -> bool:
        """Return whether this prompt, or nearly this prompt, is kept apart."""
        return text in self.exact or self._near(text)

    def _near(self, text: str) -> bool:
        if self.index is None or not self.exact:
            return False
        ours = _triples(text)
        return any(_jaccard(ours, _triples(other)) >= self.similarity for other in self.index.query(_hash(text)))


def _jaccard(ours: frozenset[str], theirs: frozenset[str]) -> float:
    shared = len(ours & theirs)
    return shared / (len(ours) + len(theirs) - shared)


@lru_cache(maxsize=4096)
def _triples(text: str) -> frozenset[str]:
    """Return the runs of three words; a prompt of fewer words is one run."""
    words = text.split()
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


@lru_cache(maxsize=1)
def _hash(text: str) -> MinHash:
    """Return the hash of a prompt; two neighbourhoods are asked about it, and its answers follow one another."""
    minhash = EMPTY.copy()
    minhash.update_batch([run.encode() for run in _triples(text)])
    return minhash
