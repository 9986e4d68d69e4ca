"""The command line's shell: lists of values, exit statuses, help that answers at once."""

import os
import shlex
import subprocess
import sys

import pytest
import typer
from tcsae import __version__, pipeline
from tcsae.errors import StoreError, UsageError


@pytest.mark.parametrize(
    "written",
    [
        ["--layers", "5", "12", "19"],
        ["--layers", "5,12,19"],
        ["--layers=5", "12", "19"],
        ["--layers=5,12,19"],
        ["--layers", "5,", "12", ",19"],
        ["--layers", "5", "--layers", "12", "--layers", "19"],
        ["--layers", "5", "12", "--layers=19"],
    ],
)
def test_every_way_to_write_a_list(written):
    assert pipeline.spread_lists(written, {"--layers"}) == ["--layers", "5", "--layers", "12", "--layers", "19"]


def test_a_list_ends_at_the_next_option_and_leaves_the_rest_alone():
    args = ["PATH", "--layers", "5", "12", "--tokens", "10M", "-q", "--layers", "19", "--", "--layers", "1", "2"]
    spread = [
        "PATH",
        "--layers",
        "5",
        "--layers",
        "12",
        "--tokens",
        "10M",
        "-q",
        "--layers",
        "19",
        "--",
        "--layers",
        "1",
        "2",
    ]
    assert pipeline.spread_lists(args, {"--layers"}) == spread


def test_key_value_lists_keep_their_commas():
    args = ["--sweep", "temporal-weight=0,0.03", "seed=0,1"]
    assert pipeline.spread_lists(args, {"--sweep"}) == ["--sweep", "temporal-weight=0,0.03", "--sweep", "seed=0,1"]


def test_a_path_with_spaces_and_commas_is_one_value(tmp_path):
    folder = tmp_path / "my runs, old"
    folder.mkdir()
    for written in (["--run", str(folder), "5"], [f"--run={folder}", "5"]):
        assert pipeline.spread_lists(written, {"--run"}) == ["--run", str(folder), "--run", "5"]


def test_negative_numbers_are_values_and_a_flag_without_one_is_left_for_the_parser():
    assert pipeline.spread_lists(["--layers", "-1", "2"], {"--layers"}) == ["--layers", "-1", "--layers", "2"]
    assert pipeline.spread_lists(["--layers", "--tokens", "5"], {"--layers"}) == ["--layers", "--tokens", "5"]


@pytest.mark.parametrize(("failure", "status"), [(StoreError("store gone"), 1), (UsageError("bad flag"), 2)])
def test_a_named_failure_is_one_sentence_and_a_status(monkeypatch, capsys, failure, status):
    def fail(**_):
        raise failure

    monkeypatch.setattr(pipeline, "app", fail)
    assert pipeline.main(["extract"]) == status
    assert capsys.readouterr().err == f"error: {failure}\n"
    with pytest.raises(type(failure)):
        pipeline.main(["extract", "--debug"])


def test_ctrl_c_says_what_stays(monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "app", interrupt)
    assert pipeline.main(["extract"]) == 130
    assert "goes on from there" in capsys.readouterr().err


def test_bad_usage_is_status_2(capsys):
    assert pipeline.main(["no-such-command"]) == 2
    assert "no-such-command" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom tcsae import pipeline\nstatus = pipeline.main(['extract', '--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'zarr', 'dask', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--layers" in done.stdout


COMMANDS = typer.main.get_command(pipeline.app).commands
TRAIN = ["What to train", "Sparsity", "Temporal term", "Optimiser", "Data", "Output"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_heading(name):
    command = COMMANDS[name]
    options = [param for param in command.get_params(typer.Context(command)) if param.param_type_name == "option"]
    headings = list(dict.fromkeys(param.rich_help_panel for param in options))
    assert None not in headings
    assert "Output" in headings
    assert name != "train" or headings == TRAIN


def asked(*arguments, **environment):
    command = [sys.executable, "-m", "tcsae", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_package_runs_as_a_module_and_says_its_version():
    done = asked("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_what_is_left_for_the_end_of_the_process_is_done():
    code = """
import atexit, sys
from tcsae import pipeline
atexit.register(print, "last")
sys.argv = ["pipeline", sys.argv[1]]
pipeline.command()
"""

    def ended(argument):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    assert ended("--version") == (0, [__version__, "last"])
    assert ended("--no-such-option") == (2, ["last"])


def test_a_shell_completes_options_without_importing_torch():
    words = {"_PIPELINE_COMPLETE": "complete_bash", "COMP_WORDS": "pipeline train --temporal-", "COMP_CWORD": "2"}
    done = asked(**words, PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.split() == [
        f"--temporal-{name}" for name in ("weight", "partner", "lag", "scope", "per-feature")
    ]
    assert "tcsae.train.command" in done.stderr
    assert "torch" not in done.stderr


def test_completion_takes_one_line_of_help(capsys):
    assert pipeline.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--install-completion" in shown
    assert "--show-completion" not in shown


def in_a_shell(command, **environment):
    """A command line with redirections; ``pipeline`` in it is this program."""
    line = command.replace("pipeline", f"{shlex.quote(sys.executable)} -m tcsae.pipeline")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=os.environ | environment)


def test_help_is_printed_in_any_encoding_and_width():
    done = in_a_shell("pipeline train --help", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0", COLUMNS="20")
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout  # the × of 8 × d_model


def test_closed_and_full_streams_are_no_bugs(tmp_path):
    done = in_a_shell(f"pipeline inspect {tmp_path}/none >&- 2>&- <&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    done = in_a_shell("pipeline --help > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: cannot print: No space left on device; free some space\n")
    done = in_a_shell("set -o pipefail; pipeline train --help | head -c 1", HOME="")
    assert "Traceback" not in done.stderr
