"""The text and elements of a page."""

import re
from html.parser import HTMLParser


class Text(HTMLParser):
    """The text of a page, without its script and style, and the names of its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self._within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within not in {"script", "style"}:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.parts))
