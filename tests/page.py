"""What a browser makes of a report's page: its elements, its links, the text a reader sees, and the data it carries."""

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "input", "hr", "circle", "path", "rect", "line"}


class Page(HTMLParser):
    """What a browser would make of the page: elements closed in order, attributes, ids and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.text += data

    def _note(self, tag, attrs):
        self.handlers += [name for name in attrs if name.startswith("on") and attrs[name] != "return false"]
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.loads += [attrs[name] for name in ("src", "srcset", "poster", "data") if name in attrs]
        if tag == "link":
            self.loads.append(attrs.get("href", ""))
        elif "href" in attrs:
            self.links.append(attrs["href"])


def data_of(text: str) -> dict:
    """The data of the page's feature browser; NaN and infinity, which no browser's JSON reader takes, are refused."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in the page's data")

    found = re.search(r'id="browser-data">(.*?)</script>', text, re.S)
    assert found, "the page carries no data"
    return json.loads(found[1], parse_constant=refuse)
