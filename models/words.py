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
