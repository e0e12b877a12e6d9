"""Text that others wrote, put into Markdown as text: prompts, answers, names, reasons, error messages.

Prefect and MLflow render Markdown in the browser of the person who opens a page. There an image in an answer would be
fetched, and a link could be clicked, so nothing in such a text may be read as Markdown, in any dialect.
"""

import html
import re

JOINER = "\u2060"
"""Word joiner: takes no room, and breaks what GitHub's Markdown would make a link of after it has read references."""
LINKS = re.compile(rf"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)(?!{JOINER})", re.IGNORECASE)
ACTIVE = re.compile(
    r"(?P<interval>\[-?\d+\.\d+, -?\d+\.\d+\](?!\s*[(\[:]))"  # an interval is no link without an address
    r"|[\\`*\[\]<>&|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word it means nothing
    r"|:(?=\S)"  # it begins an address, or an emoji, which MLflow may fetch
    r"|\A(?:[#=]|[-+](?=[-+\s]|\Z)|\d(?=\d*[.)](?:\s|\Z)))"  # heading, rule, list
)


def plain(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is: no markup, no link, no image, no HTML.

    Active characters become numeric references, which never open a structure (CommonMark 0.31, section 2.5).
    """
    line = unlinked(" ".join(text.split()))
    return ACTIVE.sub(lambda match: match["interval"] or f"&#{ord(match[0])};", line)


def unlinked(text: str) -> str:
    """Return a text in which no page finds an address to make a link of, for places that show no Markdown."""
    return LINKS.sub(JOINER, text)


def readable(markdown: str) -> str:
    """Return Markdown for a terminal, its references resolved."""
    return html.unescape(markdown).replace(JOINER, "")


def markdown_table(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, header first; cells are plain text."""
    header, *body = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return [header, "|" + "---|" * len(rows[0]), *body]
