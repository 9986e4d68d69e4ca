"""The commands from Python: the command line's options, the same configurations, silence, and tables of a report."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import house
import numpy as np
import pytest
import tcsae
import typer
from stores import make_store
from tcsae import pipeline
from tcsae.cache.arrays.config import ImportOptions
from tcsae.errors import UsageError
from tcsae.evaluate.config import EvaluateConfig, EvaluateOptions, evaluate_config
from tcsae.evaluate.finetune.config import FinetuneConfig, FinetuneOptions, finetune_config
from tcsae.evaluate.prune.config import PruneConfig, PruneOptions, prune_config
from tcsae.evaluate.results import read_results
from tcsae.extract.config import ExtractConfig, ExtractOptions, ModelSource, TextSource, extract_config
from tcsae.train.config import TrainConfig
from tcsae.train.options import TrainOptions, sweep_grid, train_config
from tcsae.train.plan import OPTIONS

COMMANDS = typer.main.get_command(pipeline.app).commands
REPORT = Path(__file__).parent / "fixtures/before/reports/report"
SMALL = {"batch_size": 60, "steps": 2, "width": 16, "k": 4, "device": "cpu", "dtype": "float32", "baseline": False}


def test_every_public_name_is_there_and_editors_are_told_the_same():
    source = (house.ROOT / "__init__.py").read_text()
    checked = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    told = [alias.asname for node in checked.body for alias in node.names]
    assert sorted(told) == sorted(set(tcsae.__all__) - {"__version__"})
    for name in tcsae.__all__:
        assert getattr(tcsae, name) is not None
    assert dir(tcsae) == sorted(tcsae.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = tcsae.no_such_name


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import tcsae; print(*sorted(set(sys.modules) - before))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in seen if name.startswith("tcsae")] == ["tcsae"]
    assert "torch" not in seen


@pytest.mark.parametrize("name", ["extract", "train", "evaluate"])
def test_a_stage_is_a_package_and_a_function(name):
    stage = getattr(tcsae, name)
    assert inspect.ismodule(stage)
    assert callable(stage)
    assert "progress" in inspect.signature(stage).parameters
    code = f"import tcsae.{name}.config; import tcsae; assert tcsae.{name}.config and callable(tcsae.{name})"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("command", "options"), [
    ("extract", ExtractOptions), ("train", TrainOptions), ("evaluate", EvaluateOptions),
    ("finetune", FinetuneOptions), ("prune", PruneOptions),
])  # fmt: skip
def test_every_option_of_a_command_has_its_name_in_python(command, options):
    shown = {"json_output", "dry_run", "show_config"}  # how the command line shows things
    on_the_line = {param.name for param in COMMANDS[command].params} - shown
    parameters = set(inspect.signature(getattr(tcsae, command)).parameters) - {"options", "progress"}
    in_python = {"resume" if name == "fresh" else name for name in {*options.__annotations__, *parameters}}
    if command == "train":
        in_python -= {"decoder", "pool", "scale", "norm_filter"}  # of --sweep and --config on the line
    else:
        in_python -= {"config"}  # of extract and evaluate, which have no argument on the line
    assert on_the_line == in_python


def test_every_option_of_an_import_has_its_name_in_python(tmp_path):
    on_the_line = {param.name for param in COMMANDS["import"].params} - {"json_output", "dry_run"}
    assert on_the_line == {"resume" if name == "fresh" else name for name in ImportOptions.__annotations__}
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 8)))
    done = tcsae.import_array(array=tmp_path / "x.npy", context=4, out=tmp_path / "x.zarr")
    assert tcsae.ActivationStore.open(done.stores[0]).n_rows == 9
    assert tcsae.import_array(done.plan.config).already_complete
    with pytest.raises(UsageError, match=r"import has no option 'kye': did you mean key\?"):
        tcsae.import_array(kye=1)
    with pytest.raises(UsageError, match="no array was named"):
        tcsae.import_array()


def test_options_of_training_are_those_that_sweeps_know():
    assert {name.replace("-", "_") for name in OPTIONS} | {"preset"} == set(TrainOptions.__annotations__)


def test_the_command_line_and_python_have_the_same_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr("tcsae.extract.run.extract", lambda config: seen.append(config) or sys.exit())
    monkeypatch.setattr("tcsae.evaluate.run.evaluate", lambda config: seen.append(config) or sys.exit())
    monkeypatch.setattr("tcsae.train.run.train", lambda config, **_: seen.append(config) or sys.exit())
    for name in ("finetune", "prune"):
        monkeypatch.setattr(f"tcsae.evaluate.{name}.run.{name}_run", lambda config: seen.append(config) or sys.exit())
    for words in (["extract", "--layers", "5"], ["evaluate"], ["train"], ["finetune", "r"], ["prune", "r"]):
        with pytest.raises(SystemExit):
            pipeline.main(words)
    options = [extract_config(layers=5), evaluate_config(), train_config(), finetune_config("r"), prune_config("r")]
    assert seen == options
    assert seen == [ExtractConfig((5,)), EvaluateConfig(), TrainConfig(), FinetuneConfig("r"), PruneConfig("r")]


def test_options_become_a_configuration():
    config = extract_config(
        layers=[5, 12], model=Path("m"), dataset="d", tokens="200k", batch_size="auto", dataset_revision="r", seed=3
    )
    assert config == ExtractConfig((5, 12), ModelSource("m"), TextSource("d", "r", seed=3), 200_000)
    assert extract_config(layers=5, batch_size=4, shard_bytes="1M").batch_size == 4
    judged = evaluate_config(run="runs/a", layer=3, sae=[Path("x")], runs="all", batch_size=8)
    assert judged == EvaluateConfig(("runs/a",), ("x",), (3,), runs_folder="all", batch_rows=8)
    tuned = finetune_config(Path("runs/a"), tokens="2k", batch_size="auto", plugin="p.py", kl_share=None, fresh=True)
    assert tuned == FinetuneConfig("runs/a", tokens=2000, plugins=("p.py",), fresh=True)
    assert prune_config("runs/a", tokens="1k", store=Path("s")) == PruneConfig("runs/a", store="s", tokens=1000)
    trained = train_config(store=Path("a.zarr"), width="16k", temporal_weight=0, log="tensorboard", lr=None)
    assert (trained.data.store, trained.sae.width, trained.temporal.weight) == ("a.zarr", 16_000, 0)
    assert (trained.run.log, trained.optimiser.lr) == (("tensorboard",), TrainConfig().optimiser.lr)


def test_a_sweep_is_written_as_on_the_line_or_as_lists():
    written = ["temporal-weight=0,0.1", "sae.b_dec=mean,zero", "seed=1"]
    lists = {"temporal_weight": np.array([0, 0.1]), "sae.b_dec": ["mean", "zero"], "seed": 1}
    assert {name: [*map(str, values)] for name, values in sweep_grid(written).items()} == {
        "temporal.weight": ["0", "0.1"], "sae.b_dec": ["mean", "zero"], "run.seed": ["1"]
    }  # fmt: skip
    assert list(sweep_grid(lists)) == list(sweep_grid(written))
    assert list(map(float, sweep_grid(lists)["temporal.weight"])) == [0, 0.1]
    assert sweep_grid({"groups": [(1,), (0.2, 1)]}) == sweep_grid(["groups=1,0.2:1"])
    with pytest.raises(UsageError, match="'temporal-wieght' cannot be swept"):
        sweep_grid({"temporal_wieght": [1]})


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: tcsae.train(temporal_wieght=1), "train has no option 'temporal_wieght': did you mean temporal_weight?"),
    (lambda: tcsae.extract(layers=[1], qqq=1), "extract has no option 'qqq': choose among layers, site, model, "),
    (lambda: tcsae.evaluate(EvaluateConfig(), runs="x"), "a configuration was given and runs beside it"),
    (lambda: tcsae.extract(layers=[1], model=""), "--model is empty"),
    (lambda: tcsae.extract(), "no layers were named"),
    (lambda: tcsae.extract(layers=[1], batch_size="many"), "--batch-size many must be a number, or auto"),
    (lambda: tcsae.train(width="much"), "'much' is not a count"),
    (lambda: tcsae.finetune("r", kl_shar=1), "finetune has no option 'kl_shar': did you mean kl_share?"),
    (lambda: tcsae.finetune("r", tokens="much"), "'much' is not a count"),
    (lambda: tcsae.finetune(FinetuneConfig("r"), lr=1e-4), "a configuration was given and lr beside it"),
    (lambda: tcsae.prune("r", min_cosin=1), "prune has no option 'min_cosin': did you mean min_cosine?"),
    (lambda: tcsae.prune(PruneConfig("r"), tokens=3), "a configuration was given and tokens beside it"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(call, sentence):
    with pytest.raises(UsageError) as refused:
        call()
    assert str(refused.value).startswith(sentence)


def test_training_from_python_is_silent_unless_asked(tmp_path, capsys):
    store = make_store(tmp_path / "cache", rows=16, d_model=8)
    done = tcsae.train(store=store, out=tmp_path / "runs", name="run", **SMALL)
    assert [path.name for path in done.runs] == ["run"]
    assert capsys.readouterr() == ("", "")
    again = tcsae.train(store=store, out=tmp_path / "runs", name="run", progress=True, fresh=True, **SMALL)
    assert again.skipped == []
    said = capsys.readouterr().err
    assert "layer 3: run" in said
    assert "training 1 SAE 100%" in said
    tcsae.train(store=store, out=tmp_path / "runs", name="other", **SMALL)
    assert capsys.readouterr().err == "", "progress is asked for one call at a time"
    swept = tcsae.train(store=store, out=tmp_path / "runs", sweep={"seed": (0, 1)}, **SMALL)
    assert len(swept.runs) == 2


def test_a_configuration_or_a_file_does_as_well(tmp_path):
    config = train_config(store=make_store(tmp_path / "cache", rows=16, d_model=8), out=tmp_path / "runs", **SMALL)
    assert tcsae.train(config).steps == 2
    (tmp_path / "my.toml").write_text('[temporal]\nform = "cosine"\n')
    (run,) = tcsae.train(tmp_path / "my.toml", store=config.data.store, out=tmp_path / "runs", **SMALL).runs
    assert "cosine" in run.name


def test_only_the_command_line_keeps_freed_memory(tmp_path, monkeypatch):
    store = make_store(tmp_path / "cache", rows=16, d_model=8)
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("the allocator was changed"))
    tcsae.train(store=store, out=tmp_path / "runs", **SMALL)
    libc = type("C", (), {"mallopt": lambda *_: asked.append(1), "malloc_trim": lambda *_: 0})()
    asked: list[int] = []
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda _: libc)
    words = ["train", "--store", str(store), "--out", str(tmp_path / "line"), "--device", "cpu", "--steps", "1"]
    assert pipeline.main(["--quiet", *words, "--batch-size", "60", "--width", "16", "--k", "4"]) == 0
    assert asked


def test_a_report_is_tables():
    report = tcsae.load_report(REPORT)
    assert report.results == read_results(REPORT)
    records = report.records.set_index("name")
    trained = records.loc["l1-topk4-pairwise0.03-w5-s0"]
    metric = report.results.record(trained.name, 1).metrics["ce"]
    assert (trained["ce"], trained["ce_low"], trained["ce_high"]) == (metric.value, metric.low, metric.high)
    assert (trained["sae.k"], trained["temporal.weight"], trained["architecture"]) == (4, 0.03, "topk")
    assert records.loc["zero"]["kind"] == "reference"
    (pair,) = report.paired.to_dict("records")
    assert (pair["first"], pair["second"]) == ("l1-topk4-pairwise0.03-w5-s0", "l1-topk4-none-s0")
    assert pair["ce"] == report.results.paired[0].metrics["ce"].value
    assert report.definitions.set_index("metric").loc["ce"]["unit"] == "nats"


def test_the_tables_are_written_as_csv(tmp_path):
    import csv

    from tcsae.evaluate.flat import write_tables

    report = tcsae.load_report(REPORT)
    for path, table in zip(write_tables(report.results, tmp_path), (report.records, report.paired), strict=True):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == list(table.columns)
        for row, wanted in zip(rows, table.to_dict("records"), strict=True):
            for name in ("ce", "ce_low", "layer"):
                assert row[name] == ("" if wanted[name] != wanted[name] else str(wanted[name]))


def test_without_pandas_a_report_is_lists(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    report = tcsae.load_report(REPORT)
    names = [row["name"] for row in report.records]
    assert names == [record.name for record in report.results.records]
    assert {len(row) for row in report.records} == {len(report.records[0])}, "the same columns in every row"
    assert report.paired[0]["kind"] == "twin"


def test_option_tables_name_fields():
    from tcsae.extract.config import MODEL_OPTIONS, TEXT_OPTIONS

    assert set(MODEL_OPTIONS.values()) == {field.name for field in fields(ModelSource)}
    assert set(TEXT_OPTIONS.values()) == {field.name for field in fields(TextSource)}
