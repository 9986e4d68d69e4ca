"""What every test shares: no network but an S3 server on loopback, deterministic torch, tiny models and
text made once.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))  # tests say: from tiny import tiny_model

import pytest
import torch
from browser import tab  # noqa: F401 - a fixture
from forks import Forks
from hub_server import HubOfTests, hub_of_tests
from hypothesis import settings
from tcsae import plugins
from tcsae.cache.store import ActivationStore
from tcsae.cache.stream import TokenStream
from tiny import KINDS, tiny_corpus, tiny_model

# The same examples in every run: what is found by chance belongs into a test of its own.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
# Under nohup or behind a shell's &, the processes that tests start would inherit that SIGHUP or SIGINT is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
_connect = socket.socket.connect


def _connect_nearby(self: socket.socket, address: Any) -> Any:
    """Loopback and local sockets only: a test that reaches for the network fails at once and says where to."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
        raise OSError(f"tests have no network: connect to {address[0]}:{address[1]} refused")
    return _connect(self, address)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


socket.socket.connect = _connect_nearby  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def _deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _popular_port_is_taken() -> Iterator[None]:
    """Dask's default port is in use during all tests, as on many machines: none of its clusters may need it."""
    with socket.socket() as other:
        with suppress(OSError):  # it is in use
            other.bind(("", 8787))
            other.listen()
        yield


@pytest.fixture(autouse=True)
def _no_plugins_of_other_tests() -> Iterator[None]:
    """What a test's plug-ins register ends with the test."""
    yield
    for file in list(plugins._loaded):
        plugins.forget_plugin(file)


def _model_fixture(kind: str) -> Any:
    @pytest.fixture(scope="session", name=f"tiny_{kind}")
    def make(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tiny_model(kind, tmp_path_factory.mktemp("models") / kind)

    return make


for _kind in KINDS:
    globals()[f"tiny_{_kind}"] = _model_fixture(_kind)


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Reports without charts: they take longer than everything else in a tiny one, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.evaluate.report.page.write_figures", lambda panels, folder: [])
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents, one .txt file each."""
    return tiny_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes that are stopped and killed."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


_S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a moto server in a process of its own."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    command, quiet = [sys.executable, "-c", _S3_SERVER], subprocess.DEVNULL
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": quiet}  # it ends when stdin does
    with subprocess.Popen(command, **pipes, text=True) as server:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on it, reached as a user would: through the environment."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"stores-{time.monotonic_ns()}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/a"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory() -> Iterator[str]:
    """A bucket that lives in this process."""
    import fsspec

    yield "memory://bucket/stores"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def chunks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of chunks of every read of a store from now on.

    A stream reads one pool ahead. Whether that read has begun when the stream is closed is left to chance, so here it
    always has: what is counted is what a run would read at most.
    """
    read: list[int] = []
    real = ActivationStore.read_chunks

    def counted(self: ActivationStore, chunks: Any, *rest: Any) -> Any:
        read.append(len(chunks))
        return real(self, chunks, *rest)

    def close(self: TokenStream) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=False)

    monkeypatch.setattr(ActivationStore, "read_chunks", counted)
    monkeypatch.setattr(TokenStream, "close", close)
    return read


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubOfTests]:
    """A hub on loopback that huggingface_hub asks, logged in as ``me``."""
    with hub_of_tests(monkeypatch, tmp_path / "hub cache") as hub:
        yield hub
