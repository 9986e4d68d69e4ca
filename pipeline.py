"""The command line: every command parses, builds one config, calls one stage, prints one summary.

The commands themselves live beside their stages (``extract/command.py`` …) and import torch and transformers only when
they run, so that ``pipeline --help`` answers at once. This file holds what they share: lists written ``--layers 5 12
19``, failures as one sentence with an exit status (0 done, 1 a named failure, 2 bad usage), Ctrl-C, and ``--debug``.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from . import __version__, demo
from . import commands as cache_command
from .cache.arrays import command as import_command
from .console import set_quiet, speaking
from .errors import TcsaeError
from .evaluate import command as evaluate_command
from .evaluate.codes import command as codes_command
from .evaluate.features import command as features_command
from .extract import command as extract_command
from .study import command as study_command
from .system.atomic_files import FULL
from .system.stop_signals import stop_signals
from .system.untrusted_files import reason, shown
from .train import command as train_command

# Typer ≥ 0.26 carries its own copy of click, earlier ones import it: this is the base of either's usage errors.
_Misuse: type[Exception] = typer.BadParameter.__bases__[0]


class _Stopped(Exception):  # noqa: N818 — being told to stop is no error
    """Ctrl-C or a signal, with the stage's last words."""


class ListCommand(TyperCommand):
    """A command whose repeatable options also take ``--layers 5 12 19``, ``--layers=5 12 19`` and ``--layers 5,12,19``.

    Typer itself wants ``--layers 5 --layers 12``; the arguments are rewritten to that before it sees them. Options that
    are not repeatable, positional arguments and everything after ``--`` are left as they were.
    """

    def get_params(self, ctx: typer.Context) -> Any:
        """--help under the last heading, not under one of its own above all others."""
        params = super().get_params(ctx)
        for param in params:
            if param.name == "help":
                setattr(param, "rich_help_panel", "Output")  # noqa: B010 - typer's, unknown to its base class
        return params

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Spread the lists, then parse as ever."""
        repeatable = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, spread_lists(args, repeatable))

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command. Typer would swallow Ctrl-C, and with it what a stage says about going on."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise _Stopped(str(stopped)) from None


class _Commands(TyperGroup):
    def get_params(self, ctx: typer.Context) -> Any:
        """Of typer's two options for shell completion one is enough in --help."""
        params = super().get_params(ctx)
        for param in params:
            if param.name == "show_completion":
                setattr(param, "hidden", True)  # noqa: B010 - an option, which the type does not say
        return params


def spread_lists(args: Sequence[str], repeatable: set[str]) -> list[str]:
    """Rewrite every list after a repeatable flag into repeated flags.

    A list ends at the next option. ``KEY=V1,V2`` values (as ``--sweep`` takes) keep their commas.
    """
    spread: list[str] = []
    flag = None
    for at, arg in enumerate(args):
        if arg == "--":
            return spread + list(args[at:])
        name, equals, value = arg.partition("=")
        if _is_option(arg):
            flag = name if name in repeatable else None
            if flag is None:
                spread.append(arg)
            elif equals:
                spread += _repeat(flag, value)
            elif at + 1 == len(args) or _is_option(args[at + 1]):
                spread.append(arg)  # no value follows: typer says so
        elif flag is not None:
            spread += _repeat(flag, arg)
        else:
            spread.append(arg)
    return spread


def _is_option(arg: str) -> bool:
    return arg.startswith("-") and not arg[1:2].isdigit()


def _repeat(flag: str, value: str) -> list[str]:
    whole = "=" in value or os.path.exists(value)  # a path may have spaces and commas
    values = [value] if whole else [part for part in value.replace(",", " ").split() if part]
    return [word for part in values for word in (flag, part)]


app = typer.Typer(
    name="pipeline",
    cls=_Commands,
    help="Train and judge sparse autoencoders with temporal consistency: extract → train → evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    extract_command,
    import_command,
    train_command,
    evaluate_command,
    codes_command,
    features_command,
    study_command,
    cache_command,
    demo,
):
    for function in module.COMMANDS:
        app.command(function.__name__.rstrip("_"), cls=ListCommand)(function)  # `import` is a keyword of Python


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress bars or notes."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback behind a failure."),  # noqa: ARG001 - main() asks
    version: bool = typer.Option(  # noqa: ARG001 - its callback comes before a command is missed
        False, "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
    ),
) -> None:
    if quiet:
        set_quiet(True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    # Asked for anywhere on the line, since that is where people type them: `pipeline extract … --debug`.
    args = list(sys.argv[1:] if argv is None else argv)
    _look_seldom_for_garbage()
    _open_standard_streams()
    shared = [arg for arg in args if arg in ("--debug", "--quiet", "-q")]
    args = shared + [arg for arg in args if arg not in shared]
    with speaking(True, seldom=True):
        return _status(args, debug="--debug" in shared)


def _status(args: list[str], *, debug: bool) -> int:
    try:
        with stop_signals():
            return app(args=args, prog_name="pipeline", standalone_mode=False) or 0
    except typer.Exit as leaving:
        return leaving.exit_code
    except _Misuse as misuse:
        misuse.show()  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    except (KeyboardInterrupt, typer.Abort, _Stopped) as stopped:
        print(f"\nstopped. {_last_words(stopped)}", file=sys.stderr)
        return 130
    except TcsaeError as failure:
        if debug:
            raise
        print(f"error: {shown(failure, 10_000)}", file=sys.stderr)
        return failure.exit_code
    except OSError as failure:
        if debug or (failure.filename is None and failure.errno not in FULL):
            raise
        if failure.filename is None:  # standard output goes to a file that cannot grow
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python may flush what is left when it ends
            print(f"error: cannot print: {reason(failure)}; free some space", file=sys.stderr)
            return 1
        why = f"{reason(failure)}; check the path, or choose another"
        print(f"error: cannot use {shown(failure.filename)}: {why}", file=sys.stderr)
        return 1


def _look_seldom_for_garbage() -> None:
    """Thousands of modules are imported and none is garbage: to look through them again and again takes a second of a
    command that needs transformers.
    """
    gc.set_threshold(10_000)


def _open_standard_streams() -> None:
    """Closed ones lead nowhere, so that no file of ours gets their number; what an encoding lacks becomes a ``?``."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def _last_words(stopped: BaseException) -> str:
    return str(stopped) or "What was committed stays; the same command goes on from there."


def command() -> NoReturn:
    """What the console script ``pipeline`` calls: :func:`main`, then the end of the process."""
    status = main()
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as at any end: threads and pools are waited for
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(status)  # the usual way, in which Python says what is wrong with them
    os._exit(status)  # nothing is left but to take thousands of modules apart one by one, which takes a second


if __name__ == "__main__":
    command()
