"""The core works alone: stores, SAEs and training without the packages of any extra, and what is missing is named."""

import subprocess
import sys
import tomllib

import house
import pytest
from stores import make_store
from tcsae.errors import MissingPackageError, needs
from tcsae.pipeline import main

# What the extras install, and what only the tests need.
LEFT_OUT = [
    "accelerate",
    "bitsandbytes",
    "dask",
    "datasets",
    "distributed",
    "gguf",
    "matplotlib",
    "pandas",
    "pip",
    "pyarrow",
    "s3fs",
]
LEFT_OUT += ["scipy", "sklearn", "threadpoolctl"]
LEFT_OUT += ["tensorboard", "tensorstore", "tokenizers", "transformers", "wandb", "xarray", "zarr"]
ALONE = f"""
import sys
for name in {LEFT_OUT}:
    sys.modules[name] = None  # as if it were not installed: neither found nor imported
sys.path.insert(0, {str(house.ROOT / "tests")!r})
"""
CORE = [path for path in house.sources() if house.part(path) in ("cache", "train") or path.parent == house.ROOT]


def alone(code: str, *arguments: str) -> str:
    """What the code prints in a process that has the core's packages only."""
    done = subprocess.run([sys.executable, "-c", ALONE + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_no_package_of_an_extra_is_a_package_of_the_core():
    project = tomllib.loads((house.ROOT / "pyproject.toml").read_text())["project"]
    name = lambda text: text.split(">")[0].split("[")[0]  # noqa: E731
    core = {name(each) for each in project["dependencies"]}
    extras = project["optional-dependencies"]
    assert not core & {name(each) for extra in set(extras) - {"dev"} for each in extras[extra]}
    assert not core & set(LEFT_OUT)
    of_users = {"arrays", "extract", "cluster", "report", "gguf", "large", "quantised", "s3", "study"}
    assert set(extras) == of_users | {"all", "docs", "dev"}


def test_every_module_of_cache_and_train_is_imported_without_them():
    names = [".".join(("tcsae", *path.relative_to(house.ROOT).with_suffix("").parts)) for path in CORE]
    modules = [name.removesuffix(".__init__") for name in names if "__main__" not in name]
    modules.remove("tcsae.train.step.triton_kernels")  # imported for CUDA devices alone, whose torch brings triton
    assert "tcsae.train.run" in modules
    alone("from importlib import import_module\nfor name in sys.argv[1:]:\n    import_module(name)", *modules)


TINY_TRAINING = """
from tcsae.pipeline import main
store, out = sys.argv[1:]
small = "--batch-size 60 --steps 2 --width 16 --k 4 --device cpu --dtype float32 --no-baseline --name run".split()
assert main(["train", "--store", store, "--out", out, *small]) == 0
assert main(["export", f"{out}/run", "--format", "dictionary-learning"]) == 0
assert main(["verify", store]) == main(["inspect", store]) == main(["inspect", f"{out}/run"]) == 0
from tcsae import ActivationStore, TemporalSAE
x_BTD = ActivationStore.open(store).rows(0, 2).float()
print(list(TemporalSAE.load(f"{out}/run")(x_BTD).features.shape))
"""


def test_a_store_is_read_trained_on_and_exported_without_them(tmp_path):
    store = make_store(tmp_path / "cache", rows=16, d_model=8)
    assert alone(TINY_TRAINING, str(store), str(tmp_path / "runs")).splitlines()[-1] == "[2, 16, 16]"


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["extract", "--layers", "1", "--model", "."], "a language model needs transformers, which is not installed: "
     "pip install 'tcsae[extract]'"),
    (["evaluate"], "a report needs matplotlib, which is not installed: pip install 'tcsae[report]'"),
    (["inspect", "STORE", "--scheduler", "tcp://127.0.0.1:1"], "--scheduler needs dask, which is not installed: "
     "pip install 'tcsae[cluster]'"),
    (["inspect", "STORE", "--picture", "norms.png"], "a picture needs matplotlib, which is not installed: "
     "pip install 'tcsae[report]'"),
    (["demo"], "the demo needs transformers, which is not installed: pip install 'tcsae[all]'"),
])  # fmt: skip
def test_what_is_missing_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys, arguments, sentence):
    for name in LEFT_OUT:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    store = str(make_store(tmp_path / "cache", rows=16, d_model=8))
    assert main([store if word == "STORE" else word for word in arguments]) == 1
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_package_that_is_there_is_not_missed():
    needs("torch", "numpy", extra="all", what="this")
    with pytest.raises(MissingPackageError, match=r"^this needs no_such_package, which"):
        needs("torch", "no_such_package", extra="all", what="this")
