"""What a person is asked before a version becomes the champion, and the form in which they answer."""

from prefect.input import RunInput
from pydantic import Field

from models.gate.gate import Verdict
from models.gate.promotion_log import Registered
from models.markdown import plain
from tasks.tracking.ledger import AGREED, REFUSED, answer_in_words


class Approval(RunInput):
    """What a person says before the champion changes."""

    agreed: bool = Field(title="Promote this version")
    by: str = Field("", title="Your name")
    why: str = Field("", title="Why")

    @property
    def state(self) -> str:
        """What the ledger calls the answer."""
        return AGREED if self.agreed else REFUSED

    def __str__(self) -> str:
        return answer_in_words(self.state, self.by, self.why)


def question(registered: Registered, verdict: Verdict | None, pages: list[tuple[str, str]]) -> str:
    """Return as Markdown what a person is asked; `pages` are (address, text)."""
    first_line = f"Shall {plain(registered.name)} version {registered.version} become the champion? It passed the gate:"
    checks = [f"- {plain(str(check))}" for check in verdict.checks] if verdict else []
    return "\n".join([first_line, "", *checks, "", " · ".join(f"[{plain(text)}]({place})" for place, text in pages)])
