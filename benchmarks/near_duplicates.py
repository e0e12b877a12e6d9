"""How many near-duplicates of held-out prompts are found, how long that takes, and in how much memory.

Held-out prompts are 8 to 40 words drawn from 5,000. What is asked is a held-out prompt with up to three words changed,
dropped or added, half of the time near an end. The true overlap comes from an index of all word triples.

    python benchmarks/near_duplicates.py [PROMPTS]
"""

import random
import resource
import sys
import time
from collections import defaultdict

from models.data.near_duplicates import NearDuplicates

ASKED, SIMILARITY = 3000, 0.8
BANDS = ((0.8, 0.85), (0.85, 0.9), (0.9, 1.01))


def main() -> None:
    """Print one line for the index, one for each band of overlap, and one for what lies below."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    held = [" ".join(draw.choices(words, k=draw.randint(8, 40))) for _ in range(count)]
    before, started = _peak(), time.perf_counter()
    apart = NearDuplicates(held, SIMILARITY)
    spent = time.perf_counter() - started
    print(f"{count:,} held-out prompts: {spent:.1f} s, {(_peak() - before) * 1024 / count:.1f} KiB each")
    asked = [edited(draw.choice(held).split(), words, draw) for _ in range(ASKED)]
    started = time.perf_counter()
    found = [apart.contains(text) for text in asked]
    print(f"{(time.perf_counter() - started) / ASKED * 1e6:.0f} µs for each of {ASKED:,} prompts that are asked about")
    true = overlaps(held, asked)
    for low, high in BANDS:
        band = [got for got, overlap in zip(found, true, strict=True) if low <= overlap < high]
        print(f"overlap {low:g} to {min(high, 1):g}: {sum(band)} of {len(band)} found ({sum(band) / len(band):.1%})")
    below = [got for got, overlap in zip(found, true, strict=True) if overlap < SIMILARITY]
    print(f"overlap below {SIMILARITY:g}: {sum(below)} of {len(below)} taken for near-duplicates")


def edited(text: list[str], words: list[str], draw: random.Random) -> str:
    """Return a prompt with up to three edits."""
    for _ in range(draw.choice([0, 1, 1, 1, 2, 2, 3])):
        place = draw.choice([0, 1, len(text) - 1, len(text) - 2, draw.randrange(len(text))])
        change = draw.choice(["replace", "drop", "add"])
        text[place : place + (change != "add")] = [] if change == "drop" else [draw.choice(words)]
    return " ".join(text)


def overlaps(held: list[str], asked: list[str]) -> list[float]:
    """Return the largest Jaccard overlap of word triples of each asked prompt with any held one."""
    sets = [triples(text) for text in held]
    places = defaultdict(list)
    for i, own in enumerate(sets):
        for triple in own:
            places[triple].append(i)
    overlaps_found = []
    for ours in map(triples, asked):
        near = {i for triple in ours for i in places.get(triple, ())}
        overlaps_found.append(max((len(ours & sets[i]) / len(ours | sets[i]) for i in near), default=0.0))
    return overlaps_found


def triples(text: str) -> set[str]:
    """Return the runs of three words."""
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
