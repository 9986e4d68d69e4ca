"""The command ``features``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .look import FeatureView
    from .probe import ProbeFindings
    from .search import Found
    from .survey import Survey

_which = partial(typer.Option, rich_help_panel="Which features")
_page = partial(typer.Option, rich_help_panel="All of them as a page")
_output = partial(typer.Option, rich_help_panel="Output")
_WIDTH = 78


def features(
    run: list[str] = typer.Argument(..., help="Folder of a run whose codes are written; several for --html."),
    feature: list[int] = _which([], "--feature", help="Show this feature; repeatable."),
    probe: str | None = _which(
        None, "--probe", help="What 1, 5 and 20 features tell of: label (of passages), token_class or position."
    ),
    search: str | None = _which(None, "--search", help="Features that fire on these words more than elsewhere."),
    sort: str = _which("density", "--sort", help="Order of the list: density, max_activation, eta_squared …"),
    ascending: bool = _which(False, "--ascending", help="Smallest first."),
    n: int = _which(20, "--n", help="Length of the list.", min=1),
    codes: str | None = _which(None, "--codes", help="The store of codes. Default: RUN/codes.zarr."),
    report: str | None = _which(None, "--report", help="Folder of an evaluation: logit effects, and home of the page."),
    logit_effects: bool = _which(
        False, "--logit-effects", help="Load the language model once and keep every feature's logit effects."
    ),
    html: bool = _page(False, "--html", help="Write every feature into a folder to open in a browser."),
    out: str | None = _page(None, "--out", help="That folder. Default: features in --report, or reports/RUN/features."),
    rows: int = _page(2000, "--rows", help="Rows of text to look at whole, from the first.", min=0),
    device: str = _output("auto", "--device", help="Of --logit-effects: auto, cuda, cuda:1, cpu."),
    json_output: bool = _output(False, "--json", help="Print one line of JSON."),
) -> None:
    """Look at features: lists, single ones with their passages, words, and a page with all of them.

    Reads the codes that `pipeline encode` wrote; of the language model only the tokenizer is needed.

    Examples:
        pipeline features runs/l12-topk64-none-s0 --sort eta_squared

        pipeline features runs/l12-topk64-none-s0 --feature 2100

        pipeline features runs/l12-topk64-none-s0 --search "federal government"

        pipeline features runs/l12-topk64-none-s0 --probe label

        pipeline features runs/l12-topk64-none-s0 --html --report reports/gemma-2-2b

    """
    import json

    from ...console import summary
    from ...errors import UsageError
    from .catalogue import codes_of, open_run
    from .survey import NUMBERS

    if sort not in NUMBERS:
        raise UsageError(f"--sort {sort} is unknown: choose one of {', '.join(NUMBERS)}")
    if len(run) > 1 and not html:
        raise UsageError(f"{len(run)} runs were named: name one, or say --html for a page of all of them")
    if codes is not None and len(run) > 1:
        raise UsageError("--codes names the codes of one run: name one run, or leave it out")
    if logit_effects:
        from .look import compute_effects

        for one in run:
            compute_effects(codes_of(one, codes), one, device)
    if html:
        from .folder import write_features

        done = write_features(run, out=out, report=report, codes=codes, rows=rows)
        summary("written", done.facts(as_json=json_output), as_json=json_output)
        return
    if probe is not None:
        from .probe import probe as ask

        told = ask(codes_of(run[0], codes), probe)
        print(json.dumps(told.facts()) if json_output else _probe_text(told))
        return
    opened = open_run(run[0], codes=codes, report=report)
    if search is not None:
        from .search import search as look_for

        found = look_for(opened.codes, opened.text, search, n, opened.effects)
        print(json.dumps(_found_facts(found)) if json_output else _found_text(search, found))
    elif feature:
        views = opened.views(feature)
        print(json.dumps([one.facts() for one in views]) if json_output else "\n\n".join(map(_view_text, views)))
    else:
        listed = opened.listed(sort, n, ascending=ascending)
        print(json.dumps(listed) if json_output else _list_text(opened.survey, listed))


def _list_text(found: Survey, listed: list[dict[str, Any]]) -> str:
    heads = {"density": "density", "max_activation": "max", "mean_activation": "mean", "lag1_autocorrelation": "lag 1",
             "run_length": "run", "eta_squared": "eta²", "neighbour_cosine": "near", "together": "with"}  # fmt: skip
    lines = [f"{'feature':>8}" + "".join(f"{head:>9}" for head in heads.values())]
    lines += [f"{one['feature']:>8}" + "".join(f"{_short(one[name]):>9}" for name in heads) for one in listed]
    return "\n".join([*lines, f"{len(listed)} of {found.n_features} features, on {found.n_tokens} tokens that count"])


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _view_text(one: FeatureView) -> str:
    card, numbers = one.card, one.card.numbers
    lines = [f"feature {card.feature}"]
    lines += [f"  {name.replace('_', ' '):<22}{_short(value)}" for name, value in numbers.items()]
    most = max((count for _, count in one.histogram), default=1)
    if one.histogram:
        lines.append("  activations")
        lines += [f"  {low:>10.3g} {count:>8} {'█' * round(40 * count / most)}" for low, count in one.histogram]
    for title, curve in (("by lag", card.lag_curve), ("by position", card.position_profile)):
        if curve is not None:
            step = max(1, len(curve.y) // 9)
            pairs = zip(curve.x[::step], curve.y[::step], strict=True)
            lines += _listed(title, (f"{x:g}: {_short(y)}" for x, y in pairs if x is not None))
    for title, pairs in (
        ("active with", [(f, v) for f, v in one.together]),
        ("near", [(near.feature, near.cosine) for near in card.neighbours]),
    ):
        if pairs:
            lines += _listed(title, (f"{other} ({value:.2f})" for other, value in pairs))
    for title, effects in (("raises", card.raises), ("lowers", card.lowers)):
        if effects:
            lines += _listed(title, (repr(effect.token) for effect in effects))
    for passage in card.passages:
        why = "" if passage.chosen == "strongest" else ", a random place where it fires"
        lines.append(
            f"  {_short(passage.activations[passage.peak])} in document {passage.document}, position "
            f"{passage.position + passage.peak}{why}"
        )
        top = max(a for a in passage.activations if a is not None)
        marked = (
            f"[{text}]" if a is not None and a > top / 2 else text
            for text, a in zip(passage.tokens, passage.activations, strict=True)
        )
        lines += _wrapped(" ".join("".join(marked).split()))
    return "\n".join(lines)


def _listed(title: str, items: Iterable[str]) -> list[str]:
    """Items in lines of bounded width, none of them cut."""
    lines, indent = [f"  {title:<12}"], " " * 14
    for item in items:
        if len(lines[-1]) > len(indent) and len(lines[-1]) + len(item) > _WIDTH:
            lines.append(indent)
        lines[-1] += item + "  "
    return [line.rstrip() for line in lines]


def _wrapped(text: str, indent: int = 4) -> list[str]:
    import textwrap

    from .page_data import visible

    return textwrap.wrap(visible(text), _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _probe_text(found: ProbeFindings) -> str:
    samples = "passages" if found.asked == "label" else "tokens"
    lines = _wrapped(found.text, 0)
    lines += [
        f"{found.n_samples} {samples} of {found.n_documents} documents, {len(found.features)} classes; 0.5 is chance"
    ]
    accuracy = [(f"k = {k}", metric) for k, metric in found.accuracy.items()]
    accuracy += [("permuted", found.permuted)] if found.permuted is not None else []
    for name, metric in accuracy:
        ends = f"  [{_short(metric.low)}, {_short(metric.high)}]" if metric.low is not None else ""
        lines.append(f"  {name:<10}{_short(metric.value):>8}{ends}")
    lines.append("best features of each class (in how many of 3 folds)")
    for name, pairs in found.features.items():
        lines += _listed(name, (f"{feature} ({folds})" for feature, folds in pairs))
    return "\n".join(lines)


def _found_facts(found: Found) -> dict[str, Any]:
    raises = [{"feature": feature, "token": token, "effect": effect} for feature, token, effect in found.raises]
    return {"occurrences": found.occurrences, "hits": [hit.facts() for hit in found.hits], "raises": raises}


def _found_text(phrase: str, found: Found) -> str:
    times = "once" if found.occurrences == 1 else f"{found.occurrences} times"
    lines = [f"'{phrase}' stands {times} in the text" if found.occurrences else f"'{phrase}' is not in the text"]
    if found.hits:
        lines.append(f"{'feature':>8}{'score':>9}{'on it':>9}{'else':>9}{'active on':>11}{'share':>9}")
        lines += [
            f"{hit.feature:>8}{_short(hit.score):>9}{_short(hit.on_phrase):>9}{_short(hit.elsewhere):>9}"
            f"{hit.occurrences:>11.0%}{hit.share:>9.1%}"
            for hit in found.hits
        ]
    if found.raises:
        lines.append("raise its logits: " + ", ".join(f"{f} ({token!r} {e:.3g})" for f, token, e in found.raises))
    return "\n".join(lines)


COMMANDS = [features]
