"""The command ``study``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .file import StudyFile
    from .plan import StudyPlan

_what = partial(typer.Option, rich_help_panel="Which study")
_how = partial(typer.Option, rich_help_panel="How to run it")
_look = partial(typer.Option, rich_help_panel="Look without running")
_output = partial(typer.Option, rich_help_panel="Output")

DOCUMENT = "docs/RESULTS.md"


def study(
    file: str = typer.Argument(..., help="The study file, such as studies/verdict.toml."),
    scale: str | None = _what(None, "--scale", help="One of its scales: small, medium, gemma. Default: as it says."),
    device: str = _how("auto", "--device", help="auto, cpu, cuda or cuda:1; for every stage."),
    scheduler: str | None = _how(
        None, "--scheduler", help="Spread the work over the Dask cluster at this address, tcp://…"
    ),
    resume: bool = _how(True, "--resume/--fresh", help="Go on with what is in its folder, or delete that first."),
    dry_run: bool = _look(False, "--dry-run", help="Print every stage with time, disk and memory, and write nothing."),
    status: bool = _look(False, "--status", help="Print what is done and what is left."),
    out: str | None = _output(None, "--out", help="Folder of the study. Default: studies/out/NAME-SCALE."),
    write_docs: bool = _output(
        False, "--write-docs", help=f"Also write {DOCUMENT} from this study and those finished beside it."
    ),
    json_output: bool = _output(False, "--json", help="Print the summary as one line of JSON."),
) -> None:
    """Extract, train, evaluate and judge as one file says: what is compared and how it is decided is fixed before.

    A study that was stopped goes on with the same command. An SAE that fails is said and does not stop the others.

    Examples:
        pipeline study studies/verdict.toml --dry-run

        pipeline study studies/verdict.toml

        pipeline study studies/verdict.toml --scale medium --status

        pipeline study studies/paper.toml --write-docs

    """
    from ..console import summary
    from .file import read_study
    from .plan import plan_study

    chosen = read_study(file, scale)
    if dry_run:
        _print_plan(plan_study(chosen, out, device=device, scheduler=scheduler), as_json=json_output)
    elif status:
        _print_status(plan_study(chosen, out), as_json=json_output)
    else:
        from .run import run_study

        done = run_study(
            chosen,
            file=file,
            out=out,
            device=device,
            scheduler=scheduler,
            fresh=not resume,
            write_docs=DOCUMENT if write_docs else None,
        )
        summary(f"study {done.name}", done.facts(as_json=json_output), as_json=json_output)


def _print_plan(plan: StudyPlan, *, as_json: bool) -> None:
    from dataclasses import asdict

    from ..console import format_bytes, summary
    from .estimate import estimate_study, total
    from .state import check_same, read_state

    state = read_state(plan.out)
    if state is not None:
        check_same(state, plan.study, plan.out)
    stages = estimate_study(plan, [name for name, each in state.stages.items() if each.done] if state else ())
    facts: dict[str, Any] = _about(plan.study) | {"SAEs": len(plan.members), "folder": str(plan.out)}
    if as_json:
        summary("", facts | {"stages": [asdict(each) for each in stages]}, as_json=True)
        return
    rows = [
        (
            each.stage,
            each.what,
            each.time,
            format_bytes(each.disk_bytes) if each.disk_bytes else "",
            "" if each.memory_bytes is None else format_bytes(each.memory_bytes),
            "" if each.seconds is None else each.from_what,
        )
        for each in stages
    ]
    _print_table(("stage", "what", "time", "disk", "memory", "time from"), rows)
    facts |= total(stages) if stages else {"time": "nothing is left but the analysis"}
    if plan.study.sizes.estimate:
        facts["estimated elsewhere"] = plan.study.sizes.estimate
    summary("planned, nothing written", facts, as_json=False)


def _print_status(plan: StudyPlan, *, as_json: bool) -> None:
    from dataclasses import asdict

    from ..console import format_duration, summary
    from .status import study_status

    found = study_status(plan)
    facts = _about(plan.study) | {"folder": str(plan.out), "analysed": found.analysed, "left": found.left}
    if as_json:
        summary("", facts | asdict(found), as_json=True)
        return
    _print_table(("stage", "state", "progress", "time"), [(s.stage, s.state, s.progress, s.time) for s in found.stages])
    facts |= {"analysed": "yes" if found.analysed else "not yet", "left": f"{found.left} of {len(found.stages)} stages"}
    facts |= {"time so far": format_duration(sum(stage.seconds for stage in found.stages))}
    facts |= {f"failed: {each.member}": each.sentence for each in found.failures}
    summary("status", facts, as_json=False)


def _about(study: StudyFile) -> dict[str, Any]:
    return {"study": study.name, "question": study.question, "scale": study.scale, "hash": study.fingerprint()}


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    table = Table(*head, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    console.print(table)


COMMANDS = [study]
