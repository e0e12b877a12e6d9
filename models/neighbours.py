"""Which prompts say nearly the same? MinHash over word triples (Broder 1997), so that no test prompt is trained on."""

import re
from collections.abc import Iterable
from functools import lru_cache

from datasketch import MinHash, MinHashLSH

from models.tokens import Message

PERMUTATIONS = 64
"""Hashes per prompt: the estimate of a similarity of 0.8 has a standard deviation of 0.05."""

EMPTY = MinHash(num_perm=PERMUTATIONS)
"""Copied for every prompt: making one draws the permutations again, which takes eight times as long."""


def text_of(prompt: list[Message]) -> str:
    """Return the words of a prompt, in lower case, without punctuation: what is compared, and what splits follow."""
    return " ".join(re.findall(r"\w+", " ".join(turn["content"] for turn in prompt).lower()))


class Neighbourhood:
    """Prompts that are kept apart from training, and the question whether another is one of them.

    Only these prompts are held in memory, about 1 kB each; the prompts that are asked about are not.
    """

    def __init__(self, prompts: Iterable[str], similarity: float) -> None:
        """Index prompts (as `text_of` returns them); `similarity` 1 compares the exact words only."""
        self.exact = set(prompts)
        self.index = None
        if similarity < 1:
            self.index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
            self.hashes = {text: _hash(text) for text in self.exact}
            self.similarity = similarity
            for text, minhash in self.hashes.items():
                self.index.insert(text, minhash)

    def holds(self, text: str) -> bool:
        """Return whether this prompt, or nearly this prompt, is kept apart."""
        return text in self.exact or self._near(text)

    def _near(self, text: str) -> bool:
        if self.index is None or not self.exact:
            return False
        ours = _hash(text)
        return any(ours.jaccard(self.hashes[other]) >= self.similarity for other in self.index.query(ours))


@lru_cache(maxsize=1)
def _hash(text: str) -> MinHash:
    """Return the hash of a prompt; two neighbourhoods are asked about it, and its answers follow one another."""
    words = text.split()
    minhash = EMPTY.copy()
    minhash.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(1, len(words) - 2))])
    return minhash
