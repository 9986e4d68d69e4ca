"""What the site shows of files that are no pages of docs/: the notebook, and two documents of the root.

mkdocs calls the functions named ``on_…`` (mkdocs.org/user-guide/configuration/#hooks).
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OF_THE_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
LISTED = {page.name for page in (ROOT / "docs").glob("*.md")}


def on_config(config: MkDocsConfig) -> None:
    """Put the pages of docs/how-to, and those of docs/ that the navigation does not name, into it."""
    named = json.dumps(config.nav)
    for section in config.nav or []:
        if "How-to" in section:
            others = sorted(path for path in (ROOT / "docs/how-to").glob("*.md") if path.name != "index.md")
            section["How-to"] = ["how-to/index.md", *(f"how-to/{path.name}" for path in others)]
        if "Reference" in section:
            section["Reference"] += sorted(name for name in LISTED if f'"{name}"' not in named)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebook with its pictures, and the documents of the root."""
    text, pictures = notebook_page(ROOT / "docs/notebook.ipynb")
    files.append(File.generated(config, "notebook.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    for name in OF_THE_ROOT:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Links to what lies outside of docs/, which is beside the pages on GitHub and not on the site."""
    here = (ROOT / "docs" / page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")

    def on_the_site(link: re.Match[str]) -> str:
        text, target, anchor = link.groups(default="")
        path = (here / target).resolve()
        if target.endswith("notebook.ipynb"):
            return f"[{text}]({target.removesuffix('.ipynb')}.md{anchor})"
        if path.is_relative_to(ROOT / "docs") or not path.exists():
            return link[0]  # mkdocs checks it
        name = path.relative_to(ROOT).as_posix()
        return f"[{text}]({up}{name}{anchor})" if name in OF_THE_ROOT else f"{text} (`{name}` in the repository)"

    return re.sub(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)", on_the_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Docstrings name objects as Sphinx does, ``:class:`~tcsae.TemporalSAE```: show the last part of the name."""
    return re.sub(r":\w+:<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in (one for one in cell["outputs"] if one.get("name") != "stderr"):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"notebook-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{cell['metadata'].get('alt', 'output of the cell above')}]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```{{ .text .output }}\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures
