"""Every figure of a candidate, by hand, from small tables."""

from models import figures


def test_what_the_user_said_last() -> None:
    assert figures.last_turn([{"role": "user", "content": "hello"}, {"role": "user", "content": "how ?"}]) == "how ?"
