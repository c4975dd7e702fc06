"""HTML of posts -> plain text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from rlhf.data.schema import BadRecord

BLOCKS = {"p", "pre", "ul", "ol", "blockquote", "div", "table", "h1", "h2", "h3", "h4", "h5", "h6", "hr"}
LINES = {"br", "tr"}
UNSEEN = {"script", "style"}


def html_text(html: str) -> str:
    """The visible text: without tags, with entities resolved and a blank line between blocks.

    List items begin with ``- ``. Code blocks are put between lines of three backticks with their white space as it is,
    inline code between backticks. Links leave their text, images nothing.

    Raises:
        BadRecord: The HTML cannot be parsed.
    """
    parser = _Parser()
    try:
        parser.feed(html)
        parser.close()
    except AssertionError as error:  # raised by html.parser for an unknown declaration
        raise BadRecord("HTML that cannot be parsed", str(error)) from None
    return re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)).strip()


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._code = self._unseen = 0  # how many such elements are open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "pre":
            self.parts.append("\n\n```\n")
            self._code += 1
        elif tag in BLOCKS or tag in LINES:
            self.parts.append("\n\n" if tag in BLOCKS else "\n")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag == "code" and not self._code:
            self.parts.append("`")
        self._unseen += tag in UNSEEN

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre" and self._code:
            self._code -= 1
            self.parts.append("```\n\n" if self.parts[-1].endswith("\n") else "\n```\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n\n")
        elif tag == "code" and not self._code:
            self.parts.append("`")
        self._unseen -= tag in UNSEEN and self._unseen > 0

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.parts.append(data if self._code else _in_line(data))


def _in_line(text: str) -> str:
    """White space as a browser shows it; between blocks there is none."""
    return "" if text.isspace() and "\n" in text else re.sub(r"\s+", " ", text)
