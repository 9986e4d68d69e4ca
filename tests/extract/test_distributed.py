"""Dask workers write the store that one process writes, byte for byte, also when one of them is killed."""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import LOCAL, cluster_elsewhere
from tcsae.cache.format.layout import StoreLayout
from tcsae.cache.format.manifest import Execution
from tcsae.cache.store import ActivationStore
from tcsae.errors import ResourceError, StaleRunError
from tcsae.extract.distributed import Job, _passes
from tcsae.extract.model.load import load_language_model
from tcsae.extract.run import extract
from tcsae.extract.text.rows import row_blocks
from tcsae.sites import Location

from tests.extract.snapshots import contents

pytestmark = [
    pytest.mark.usefixtures("small_shards"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that Dask's event loop closes late
]
CONTEXT = 16
SLOW = """
import time
from tcsae.extract.model.forward import ForwardPass
launch = ForwardPass.launch
ForwardPass.launch = lambda self, block: (time.sleep(0.1), launch(self, block))[1]
"""
EXECUTION = Execution(batch_size=4, threads=1, device="cpu")


@pytest.fixture
def config(config):
    return replace(config, tokens=60 * CONTEXT)


def test_a_workers_shard_is_run_in_the_same_batches(config, tiny_gemma2):
    from tcsae.extract.model.forward import ForwardPass

    lm = load_language_model(config.model, deepest_layer=2)
    block, _ = next(row_blocks(config.text, lm, rows_per_block=7))
    job = Job(config.model, lm.identity, ((Location(2), ""),), StoreLayout(24, CONTEXT, 4, 8), EXECUTION, "run")
    parts = list(_passes(lm, [Location(2)], job, block, 0))
    assert [len(rows) for rows, _ in parts] == [4, 3]
    alone = ForwardPass(lm, [Location(2)], 4).launch(block.slice(4, 7)).result()[Location(2)]
    assert (parts[1][1][Location(2)] == alone).all()


def test_a_task_whose_run_was_stopped_says_so_where_it_runs(config, capsys, monkeypatch):
    from tcsae.extract import distributed

    extract(config)
    lm = load_language_model(config.model, deepest_layer=2)
    monkeypatch.setattr(distributed, "_model", lambda *_: lm)
    block, _ = next(row_blocks(config.text, lm, rows_per_block=8))
    job = Job(
        config.model,
        lm.identity,
        tuple(config.paths.items()),
        StoreLayout(24, CONTEXT, 4, 8),
        EXECUTION,
        "a stopped run",
    )
    before = contents(Path(config.out))
    assert isinstance(distributed._extract_shard(job, 1, block, 0), StaleRunError)
    assert re.search(r"warning: shard 1: the run that was writing .*l1.zarr has ended", capsys.readouterr().err)
    assert contents(Path(config.out)) == before


def test_workers_write_the_same_store_though_one_is_killed(config, tmp_path):
    from distributed import Client, LocalCluster

    extract(config)
    with LocalCluster(n_workers=2, processes=True, **LOCAL) as cluster, Client(cluster) as client:
        pids = list(client.run(os.getpid).values())
        client.run(exec, SLOW, {})  # a shard takes long enough for the kill to fall inside one
        other = replace(config, out=str(tmp_path / "b"), scheduler=cluster.scheduler_address)
        log = tmp_path / "b" / "l2.zarr" / "activations" / "commits.jsonl"
        killer = threading.Thread(target=_kill_when_committing, args=(log, pids[0]))
        killer.start()
        done = extract(other)
        killer.join()
        assert pids[0] not in client.run(os.getpid).values()
    assert done.rows == 60
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _kill_when_committing(log: Path, pid: int) -> None:
    while not (log.exists() and log.read_bytes().count(b"\n") >= 1):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def test_a_scheduler_lost_in_the_middle_is_a_sentence_and_the_same_command_goes_on(config, tmp_path, capfd):
    extract(config)
    other = replace(config, out=str(tmp_path / "b"))
    log = tmp_path / "b" / "l2.zarr" / "activations" / "commits.jsonl"
    with cluster_elsewhere(SLOW) as (address, process):
        killer = threading.Thread(target=_kill_when_committing, args=(log, process.pid))
        killer.start()
        with pytest.raises(ResourceError, match=rf"scheduler at {address} was lost .*: what was committed stays; "):
            extract(replace(other, scheduler=address))
        killer.join()
    assert "Traceback" not in capfd.readouterr().err
    assert 8 <= ActivationStore.open(other.paths[Location(2)], allow_unfinished=True).n_rows < 60
    extract(other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_our_own_failures_are_not_tried_again(config, monkeypatch):
    from distributed import LocalCluster
    from tcsae.extract import distributed

    tried = []

    def full(*_, **__):
        tried.append(1)
        raise ResourceError("the disk is full: free some space")

    monkeypatch.setattr(distributed, "write_shard", full)
    with LocalCluster(n_workers=1, processes=False, **LOCAL) as cluster:
        one = replace(config, tokens=8 * CONTEXT, scheduler=cluster.scheduler_address)
        with pytest.raises(ResourceError, match="the disk is full: free some space"):
            extract(one)
    assert tried == [1]


def test_ctrl_c_is_for_the_coordinator_alone():
    """A terminal sends it to every process of the command: workers would answer with a traceback each."""
    from tcsae.cache.cluster import local_cluster

    with local_cluster(1) as client:
        assert all(signal.SIGINT in mask for mask in client.run(signal.pthread_sigmask, signal.SIG_BLOCK, []).values())
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_a_local_cluster_extends_what_one_process_began(config, tmp_path):
    extract(config)
    other = replace(config, out=str(tmp_path / "b"))
    extract(replace(other, tokens=13 * CONTEXT))
    done = extract(replace(other, workers=2))
    assert done.tokens == 47 * CONTEXT
    ours, theirs = (ActivationStore.open(tmp_path / name / "l2.zarr") for name in "ab")
    assert (ours.tokens(0, 60) == theirs.tokens(0, 60)).all()
    assert ours.rows(0, 60).equal(theirs.rows(0, 60))
    assert extract(replace(other, workers=2)).already_complete


def test_no_scheduler_is_a_sentence(config, monkeypatch):
    from tcsae.cache import cluster

    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ResourceError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1"):
        extract(replace(config, scheduler="tcp://127.0.0.1:1"))
