"""The how-to page's own examples, in SAELens and dictionary_learning themselves, where they are installed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from stores import make_store
from tcsae.train.sae.temporal_sae import TemporalSAE

PAGE = Path(__file__).parents[2] / "docs/how-to/train-elsewhere.md"
SMALL = {
    "1024": "60", "2048": "32", "1_000_000": "1200", "steps = 1000": "steps = 20", "k=32": "k=4", '"k": 32': '"k": 4',
    "_steps=100": "_steps=2", "_steps=200": "_steps=4", '_steps": 50': '_steps": 2',
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("package", "result"), [("sae_lens", "saelens-sae"), ("dictionary_learning", "dictionary/trainer_0")]
)
def test_it_trains_on_our_batches(tmp_path, monkeypatch, package, result):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package)
    (tmp_path / "cache").mkdir()
    Path(make_store(tmp_path / "built", rows=64, d_model=8)).rename(tmp_path / "cache/l12.zarr")
    monkeypatch.chdir(tmp_path)
    (example,) = [
        block for block in re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.M | re.S) if package in block
    ]
    for large, small in SMALL.items():
        example = example.replace(large, small)
    exec(compile(example, PAGE.name, "exec"), {})
    sae = TemporalSAE.load(result)
    assert (sae.d_model, sae.n_features) == (8, 32)
