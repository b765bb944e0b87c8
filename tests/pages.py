"""What a page has to be: closed elements, and nothing that reaches out."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements that were opened and not closed, all of them, the text, and what elements say that they are about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.states: list[str] = []
        self.uses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = {name: value or "" for name, value in attrs}
        assert not given.keys() & {"src", "onload"}
        assert given.get("href", "#").startswith("#"), "links lead to places of the page"
        self.states += given.get("data-t", "").split()
        self.uses += given.get("data-u", "").split()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
