"""The members of a study on Dask workers: what one process finds."""

from __future__ import annotations

import sys

import pytest
import tcsae
from clusters import cluster_elsewhere
from distributed import Client
from tcsae.evaluate.results import read_results
from tcsae.study.state import read_state
from tcsae.train.run_folder.record import load_run
from tiny import tiny_corpus
from tiny_study import without_figures, write_study

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets that Dask's event loop closes late


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    without_figures(monkeypatch)


def numbers(folder):
    """Metrics of every SAE, without what its training cost."""
    (report,) = (read_results(path.parent) for path in (folder / "reports").glob("*/results.json"))
    return {
        record.name: {k: (m.value, m.low) for k, m in record.metrics.items() if not k.startswith("training")}
        for record in report.records
    }


def test_workers_share_the_members_and_find_what_one_process_finds(tiny_gemma2, tmp_path):
    text = tiny_corpus(tmp_path / "text", documents=60, words=60)
    absurd = {'"temporal.weight" = 0.1 }': '"temporal.weight" = 0.1, "optimiser.lr" = 1e30 }'}
    file = write_study(
        tmp_path / "tiny.toml", tiny_gemma2, text, **absurd, **{"[0]\nvar": "[0, 1]\nvar", "rows = 4": "rows = 48"}
    )
    alone = tcsae.study(file, scale="one", out=tmp_path / "alone", device="cpu")
    with cluster_elsewhere(workers=2) as (address, _):
        there = tcsae.study(file, scale="one", out=tmp_path / "there", device="cpu", scheduler=address)
        with Client(address) as client:
            measured = client.run(lambda: len(sys.modules["tcsae.evaluate.distributed"]._known))
    assert list(measured.values()) == [1, 1], "rows of the text went to both workers"
    assert there.failures == alone.failures
    assert [name.split()[-1] for name in there.failures] == ["l1-next-s0", "l1-next-s1"]
    found, wanted = numbers(there.folder), numbers(alone.folder)
    assert found.keys() == wanted.keys()
    for name, metrics in wanted.items():
        assert found[name].keys() == metrics.keys()
        for key, ends in metrics.items():  # sums in another order
            for one, other in zip(found[name][key], ends, strict=True):
                assert one == (other if other is None else pytest.approx(other, rel=1e-4, abs=1e-6)), (name, key)
    state = read_state(there.folder)
    assert state is not None
    assert state.finished
    of_pass = [load_run(path).cost["members"] for path in there.folder.glob("runs/*/*-none-*")]
    assert of_pass == [1.0, 1.0]  # of four SAEs two on each worker, of which one failed
