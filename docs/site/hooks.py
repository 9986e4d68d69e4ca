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
    """On GitHub the documents of the root lie above docs/, on the site beside its pages."""
    for name in OF_THE_ROOT:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown.replace("](notebook.ipynb)", "](notebook.md)").replace("](../notebook.ipynb)", "](../notebook.md)")


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
