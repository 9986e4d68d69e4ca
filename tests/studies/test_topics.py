"""The script that lays out a text of known topics, without the network: pages become text, and enough of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from tcsae.errors import TextError

SCRIPT = Path(__file__).parents[2] / "studies" / "topics.py"


@pytest.fixture(scope="module")
def topics():
    spec = importlib.util.spec_from_file_location("topics_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_html_becomes_readable_text(topics):
    page = (
        "<html><head><title>T</title><style>x{}</style></head><body><nav>menu</nav><h1>One &amp; two</h1>"
        "<p>A   <b>bold</b>\nword.</p><pre>a\n  b</pre><script>no()</script><ul><li>first<li>second</ul></body></html>"
    )
    lines = [line for line in topics.html_text(page).splitlines() if line.strip()]
    assert lines == ["One & two", "A bold word.", "a", "  b", "first", "second"]


def test_pod_becomes_readable_text(topics):
    pod = "=head1 NAME\n\nperl - B<the I<language>>\n\n=over 4\n\n=item C<< $x->y >>\n\nText.\n"
    assert topics.pod_text(pod).split() == ["NAME", "perl", "-", "the", "language", "$x->y", "Text."]


def test_lines_of_most_pages_go_and_others_stay(topics):
    pages = {f"{n}": f"Project menu\nAbout {n}\n\n\n\nshared\nbody {n}  \n" for n in range(10)}
    tidied = topics.tidy(pages | {f"x{n}": f"only {n}" for n in range(2)})
    assert tidied["3"] == "About 3\n\nbody 3\n"


def test_documents_are_long_enough_short_enough_and_about_as_many_characters(topics):
    pages = {f"page{n}": f"{n} " + "word " * (50 * n) for n in range(40)}
    found = topics.chosen(pages, 10_000, 2_000, 3_000)
    assert all(2_000 <= len(text) <= 3_000 for text in found.values())
    assert 10_000 <= sum(map(len, found.values())) < 13_000
    assert found == topics.chosen(dict(reversed(pages.items())), 10_000, 2_000, 3_000)


def test_files_lie_in_a_folder_of_their_topic(topics, tmp_path):
    topics.write({"a/b.c": "text"}, tmp_path / "music")
    assert (tmp_path / "music" / "a-b.c.txt").read_text() == "text"


def test_versioned_packages_are_followed(topics, monkeypatch):
    monkeypatch.setattr(topics, "_run", lambda *_: "postgresql-doc\n  Depends: postgresql-doc-15\n  Depends: perl\n")
    assert list(topics._versioned("postgresql-doc")) == ["postgresql-doc-15"]
    monkeypatch.setattr(topics, "_run", lambda *_: "  Depends: python3.11-doc\n  Depends: libjs-sphinxdoc\n")
    assert list(topics._versioned("python3-doc")) == ["python3.11-doc"]


def test_without_apt_it_says_so(topics, monkeypatch, tmp_path):
    monkeypatch.setattr(topics.shutil, "which", lambda _: None)
    with pytest.raises(TextError, match="no apt-get"):
        topics.pages_of(topics.TOPICS["git"], tmp_path / "git")
