"""The examples of docs/EXTENDING.md, each as the plug-in it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saes import random_sae
from tcsae.errors import RunError
from tcsae.plugins import load_plugins
from tcsae.registry import Registry
from tcsae.train.formats.locate import load_external
from tcsae.train.formats.registry import FORMATS, writable_format

PAGE = Path(__file__).parents[1] / "docs" / "EXTENDING.md"


@pytest.fixture
def example(tmp_path):
    """Write the Python file of a section and load it as a plug-in; what it registered is forgotten afterwards."""
    written = []

    def load(heading: str) -> Path:
        section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
        source = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)[0]
        assert 10 <= len(source.splitlines()) <= 35
        file = tmp_path / "example.py"
        file.write_text(source, encoding="utf-8")
        written.append(file)
        load_plugins([file])
        return file

    yield load
    for file in written:
        Registry.forget_plugin(str(file.resolve()))


def test_an_sae_format(example, tmp_path):
    example("An SAE format")
    sae = random_sae().eval()
    FORMATS.get(writable_format("lab_npz")).write(sae, tmp_path / "sae")
    found = load_external(str(tmp_path / "sae"))
    assert (found.source, found.layer, found.name) == ("lab-npz", 3, "sae")
    x = torch.randn(4, 6)
    assert torch.equal(found.sae.encode(x), sae.encode(x))


def test_what_an_example_registered_is_forgotten_afterwards(tmp_path):
    (tmp_path / "lab.npz").write_bytes(b"")
    with pytest.raises(RunError, match="holds no SAE of a known format"):
        load_external(str(tmp_path), 0)


def test_a_plugin_may_be_the_first_to_use_a_built_in(tmp_path):
    """In a process of its own: here every built-in module was imported long ago."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("from tcsae.train.formats.saelens import SAELens\n")
    code = (
        "import sys; from tcsae.plugins import load_plugins; from tcsae.train.formats.registry import FORMATS; "
        "load_plugins(sys.argv[1:]); assert FORMATS.owner('saelens') is None; assert FORMATS.get('saelens')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(plugin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
