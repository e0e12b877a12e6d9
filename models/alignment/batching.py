"""The order in which rows are trained on: drawn here, once, for all epochs, so that a resumed training has the same.

The trainer reads the rows one after the other. Where the recipe asks for similar lengths, batches hold rows of similar
length (little padding) and come in random order; length often depends on the topic, so such batches are less mixed.
"""

import math
from collections.abc import Sequence

import numpy as np

from models.recipe import Schedule, Training

POOL = 8
"""Batches that are drawn at random together and then sorted by length: more save padding, fewer mix better."""


def updates(rows: int, config: Training) -> int:
    """Return the number of optimiser updates of a step."""
    return config.updates or max(1, math.ceil(config.epochs * rows / config.batch))


def moves_nothing(count: int, config: Training) -> str:
    """Return why a training of so many updates would leave the weights as they are; empty if it would not."""
    if count > 1 or not config.warmup or config.schedule is Schedule.constant:
        return ""
    return (
        "its only update is the first of the warm-up, whose learning rate is 0, so that nothing would be trained: "
        "give a smaller batch, more epochs or updates, or warmup = 0"
    )


def order(lengths: Sequence[int], config: Training, seed: int) -> list[int]:
    """Return the index of the row at each place of the whole training: `updates` times `batch` places.

    Every row is seen once before any is seen twice; with similar lengths that is so up to one pool of POOL batches.
    """
    total = updates(len(lengths), config) * config.batch
    rng = np.random.default_rng(seed)
    stream = np.concatenate([rng.permutation(len(lengths)) for _ in range(math.ceil(total / len(lengths)))])[:total]
    size = np.asarray(lengths)
    micro = config.micro_batch or config.batch
    places: list[int] = []
    # Without similar lengths a pool is one batch, whose rows are only spread over its micro-batches by length: the
    # gradient is the same, with less padding
    pool_size = (POOL if config.similar_lengths else 1) * config.batch
    for start in range(0, total, pool_size):
        pool = stream[start : start + pool_size]
        pool = pool[np.argsort(size[pool], kind="stable")]
        blocks = [pool[i : i + micro] for i in range(0, len(pool), micro)]
        places += [int(i) for b in rng.permutation(len(blocks)) for i in blocks[b]]
    return places


def stratified(labels: Sequence[bool], config: Training, seed: int) -> list[int]:
    """Return the order of a KTO training: shuffled, with both labels spread evenly, so that no batch has only one.

    Length is left alone: refusals are short, and batches of one length would be batches of one label.
    """
    total = updates(len(labels), config) * config.batch
    rng = np.random.default_rng(seed)
    values = np.asarray(labels)
    places: list[int] = []
    while len(places) < total:
        # Each label's rows get evenly spaced positions in [0, 1), in random order and from a random start; sorting all
        # rows by position mixes the labels in their proportion everywhere
        position = np.empty(len(values))
        for value in (True, False):
            rows = rng.permutation(np.flatnonzero(values == value))
            position[rows] = (np.arange(len(rows)) + rng.random()) / max(1, len(rows))
        places += [int(i) for i in np.argsort(position, kind="stable")]
    return places[:total]


def mismatched(prompts: Sequence[list[int]], batch: int) -> list[int]:
    """Return for each place another place of its batch whose prompt differs, where the batch has one.

    Rotating a batch by the smallest step that never meets the same prompt keeps its answers the same set.
    """
    partners: list[int] = []
    for start in range(0, len(prompts), batch):
        block = range(start, min(start + batch, len(prompts)))

        def clashes(step: int, block: range = block) -> int:  # bound now: the loop changes `block`
            return sum(prompts[i] == prompts[block[(i - block.start - step) % len(block)]] for i in block)

        step = min(range(1, max(2, len(block))), key=clashes)
        partners += [block[(i - start - step) % len(block)] for i in block]
    return partners
