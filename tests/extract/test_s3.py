"""Extraction by Dask workers into a bucket, typed as a user types it: the store that one process writes on its disk."""

import pytest
from tcsae.pipeline import main

from tests.extract.snapshots import contents

pytestmark = [
    pytest.mark.usefixtures("small_shards"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that Dask's event loop closes late
]


@pytest.fixture
def words(tiny_gemma2, corpus):
    about = [
        "--model",
        str(tiny_gemma2),
        "--dataset",
        str(corpus),
        "--context",
        "16",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    return ["extract", *about, "--layers", "1", "2", "--batch-size", "4"]


def test_workers_fill_a_bucket_with_the_store_that_one_process_writes(words, s3, tmp_path, capsys):
    import s3fs

    words += ["--tokens", "640"]
    assert main([*words, "--out", str(tmp_path / "here")]) == 0
    assert main([*words, "--out", s3, "--workers", "2"]) == 0
    s3fs.S3FileSystem().get(s3, str(tmp_path / "there"), recursive=True)
    here = contents(tmp_path / "here")
    assert contents(tmp_path / "there") == here
    assert sum(name.startswith("l2.zarr/activations/c.") for name in here) == 5
    assert [main(["verify", f"{s3}/l{layer}.zarr"]) for layer in (1, 2)] == [0, 0]
    assert f"{s3}/l2.zarr: sound" in capsys.readouterr().out
    assert main([*words, "--out", s3, "--workers", "2"]) == 0
    assert capsys.readouterr().out.startswith("already complete")


def test_a_bucket_that_is_not_there_is_a_sentence(words, s3, capsys):
    assert main([*words, "--tokens", "64", "--out", "s3://nowhere/cache"]) == 1
    assert "cannot write s3://nowhere/cache/l1.zarr" in (said := capsys.readouterr().err)
    assert "create the bucket first" in said
