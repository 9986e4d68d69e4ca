"""The house in numbers: files per folder, import cycles, imports that run upwards. Reads the source, runs none of it.

python tests/house.py        prints the picture of the folders
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("system", "cache", "extract", "train", "evaluate", "study")
# Who may import whom: only what stands on a lower level. Root files that nothing else needs stand highest.
LEVEL = {"errors": 0, "progress_bar": 0} | dict.fromkeys(
    ("system", "console", "registry", "options", "callable_package"), 1
)
LEVEL |= {"plugins": 2, "sites": 2, "cache": 3, "train": 4, "extract": 4, "evaluate": 5, "study": 6}
LEVEL |= {"interface": 7, "on_disk": 7, "demo": 8, "commands": 8, "pipeline": 9, "__main__": 10}


def sources() -> list[Path]:
    """Every file of the package, tests and benchmarks apart."""
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return sorted(ROOT.glob("*.py")) + inside


def imports(path: Path) -> Iterator[tuple[Path | None, str, int]]:
    """(file of ours or None, module as written, line) of every import that runs: not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    unseen = {id(node) for test in ast.walk(tree) if _type_checking(test) for node in ast.walk(test)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from ((None, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield None, node.module or "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                found = _file(base / alias.name) or _file(base)
                yield found, node.module or alias.name, node.lineno


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _file(base: Path) -> Path | None:
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def cycles(files: list[Path]) -> list[list[str]]:
    """Groups of files that import each other, in circles (strongly connected components, by Tarjan's algorithm)."""
    edges = {path: [to for to, *_ in imports(path) if to and to.name != "__init__.py"] for path in files}
    number: dict[Path, int] = {}
    lowest: dict[Path, int] = {}
    open_: list[Path] = []
    found: list[list[str]] = []

    def visit(path: Path) -> None:
        number[path] = lowest[path] = len(number)
        open_.append(path)
        for to in edges.get(path, []):
            if to not in number:
                visit(to)
            if to in open_:
                lowest[path] = min(lowest[path], lowest[to])
        if lowest[path] == number[path]:
            group = open_[open_.index(path) :]
            del open_[open_.index(path) :]
            if len(group) > 1:
                found.append(sorted(str(each.relative_to(ROOT)) for each in group))

    for path in files:
        if path not in number:
            visit(path)
    return found


def upward(path: Path) -> list[str]:
    """Imports of a file that do not run downwards."""
    own = part(path)
    return [
        f"{path.relative_to(ROOT)}:{line} imports {to.relative_to(ROOT)}"
        for to, _, line in imports(path)
        if to and to != ROOT / "__init__.py" and part(to) != own and LEVEL[part(to)] >= LEVEL[own]
    ]


def part(path: Path) -> str:
    """Folder or root file that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def files_per_folder() -> dict[str, int]:
    """Folder → its files, ``__init__.py`` apart."""
    folders = sorted({path.parent for path in sources()})
    return {
        str(folder.relative_to(ROOT)): sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        for folder in folders
    }


if __name__ == "__main__":
    for folder, count in files_per_folder().items():
        names = sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
        depth = 0 if folder == "." else folder.count("/") + 1
        print(f"{'  ' * depth}{folder.split('/')[-1] + '/':<{24 - 2 * depth}}{count:>3}  {' '.join(names)}")
    above = [line for path in sources() if path.name != "__init__.py" for line in upward(path)]
    print(f"{len(cycles(sources()))} import cycles, {len(above)} imports upwards")
