"""Words that several sentences share."""


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun: `1 prompt`, `2 prompts`, `1,024 pairs`; `nouns` where the plural is another."""
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def spent_on(kind: str) -> str:
    """Return what the gate calls its check of the error that earlier decisions have used of a kind of test prompts."""
    return f"error spent on the {kind} prompts"


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line of at most 200 characters; an error without words by its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def too_few(n: int, at_least: float, confidence: float, where: str = "") -> str:
    """Say that n harmful prompts cannot show the bound, whatever the answers are, and how many can.

    Args:
        where: which prompts these are, as ` of the smallest category`.
    """
    from models.metrics.statistics import (  # scipy takes a second, and not all words need it
        enough_prompts,
        fewest_prompts,
    )

    safer = (1 + at_least) / 2
    verb = "is" if n == 1 else "are"
    return (
        f"{counted(n, 'harmful prompt')}{where} {verb} too few to show {at_least:g} at confidence {confidence:g}, even "
        f"if every answer is safe: you need at least {fewest_prompts(at_least, confidence)}, and about "
        f"{enough_prompts(safer, at_least, confidence)} for a policy that is {safer:g} safe. Half of a suite's prompts "
        "choose, half test, so the suite needs twice as many"
    )
