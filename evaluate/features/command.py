"""The command ``features``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .look import FeatureView
    from .probe import ProbeFindings
    from .search import Found
    from .survey import Survey

_which = partial(typer.Option, rich_help_panel="Which features")
_page = partial(typer.Option, rich_help_panel="All of them as files")
_label = partial(typer.Option, rich_help_panel="Labels from a language model")
_output = partial(typer.Option, rich_help_panel="Output")
_WIDTH = 78


def features(
    run: list[str] = typer.Argument(..., help="Folder of a run whose codes are written; several for --html."),
    feature: list[int] = _which([], "--feature", help="Show this feature; repeatable."),
    probe: str | None = _which(
        None,
        "--probe",
        help="What 1, 5 and 20 features tell of: label (of passages), label_token, token_class or position.",
    ),
    search: str | None = _which(None, "--search", help="Features that fire on these words more than elsewhere."),
    sort: str = _which("density", "--sort", help="Order of the list: density, max_activation, eta_squared …"),
    ascending: bool = _which(False, "--ascending", help="Smallest first."),
    n: int = _which(20, "--n", help="Length of the list.", min=1),
    codes: str | None = _which(
        None, "--codes", help="The store of codes. Default: what --report keeps, else RUN/codes.zarr."
    ),
    report: str | None = _which(
        None, "--report", help="Folder of an evaluation: its codes and logit effects, and home of the page."
    ),
    logit_effects: bool = _which(
        False, "--logit-effects", help="Load the language model once and keep every feature's logit effects."
    ),
    label: bool = _label(
        False, "--label", help="Ask a language model for a short label of each feature of the list, or of --feature."
    ),
    endpoint: str | None = _label(
        None, "--endpoint", help="OpenAI-compatible address, http://localhost:8000/v1. Key: TCSAE_LABEL_KEY."
    ),
    label_model: str | None = _label(None, "--label-model", help="The model's name there."),
    html: bool = _page(False, "--html", help="Write every feature into a folder to open in a browser."),
    neuronpedia: bool = _page(
        False, "--neuronpedia", help="Write every feature as SAEDashboard does for Neuronpedia: batch-0.json …"
    ),
    out: str | None = _page(
        None, "--out", help="That folder. Default: features in --report, or reports/RUN/features; RUN/neuronpedia."
    ),
    rows: int = _page(2000, "--rows", help="Rows of text to look at whole, from the first.", min=0),
    device: str = _output("auto", "--device", help="Of --logit-effects: auto, cuda, cuda:1, cpu."),
    json_output: bool = _output(False, "--json", help="Print one line of JSON."),
) -> None:
    """Look at features: lists, single ones with their passages, words, and a page with all of them.

    Reads the codes that `pipeline encode` or `pipeline evaluate --codes` wrote; of the language model only the
    tokenizer is needed.

    Examples:
        pipeline features runs/l12-topk64-none-s0 --sort eta_squared

        pipeline features runs/l12-topk64-none-s0 --feature 2100

        pipeline features runs/l12-topk64-none-s0 --search "federal government"

        pipeline features runs/l12-topk64-none-s0 --probe label

        pipeline features runs/l12-topk64-none-s0 --report reports/gemma-2-2b --probe label

        pipeline features runs/l12-topk64-none-s0 --html --report reports/gemma-2-2b

        pipeline features runs/l12-topk64-none-s0 --logit-effects --neuronpedia

        pipeline features runs/l12-topk64-none-s0 --n 50 --label --endpoint http://localhost:8000/v1 --label-model qwen

    """
    import json
    import os

    from ...console import summary
    from ...errors import UsageError
    from .catalogue import codes_of, open_run
    from .survey import NUMBERS

    if sort not in NUMBERS:
        raise UsageError(f"--sort {sort} is unknown: choose one of {', '.join(NUMBERS)}")
    if label and (html or neuronpedia or search is not None):
        raise UsageError("--label asks for labels alone: say --search, --html or --neuronpedia in the next command")
    if len(run) > 1 and not html:
        raise UsageError(f"{len(run)} runs were named: name one, or say --html for a page of all of them")
    if codes is not None and len(run) > 1:
        raise UsageError("--codes names the codes of one run: name one run, or leave it out")
    _check_label(label, endpoint, label_model)
    if logit_effects:
        from .look import compute_effects

        for one in run:
            compute_effects(codes_of(one, codes, report), one, device)
    if neuronpedia:
        from .neuronpedia import write_neuronpedia

        if html:
            raise UsageError("--html and --neuronpedia write different folders: say one of them at a time")
        written = write_neuronpedia(run[0], out=out, codes=codes, report=report)
        summary("written", written.facts(as_json=json_output), as_json=json_output)
        return
    if html:
        from .folder import write_features

        done = write_features(run, out=out, report=report, codes=codes, rows=rows)
        summary("written", done.facts(as_json=json_output), as_json=json_output)
        return
    if probe is not None:
        from .probe import probe as ask

        told = ask(codes_of(run[0], codes, report), probe)
        print(json.dumps(told.facts()) if json_output else _probe_text(told))
        return
    opened = open_run(run[0], codes=codes, report=report)
    if endpoint is not None and label_model is not None:
        from .chat_endpoint import KEY_VARIABLE, ChatEndpoint
        from .labels import label_features

        asked = feature or [one["feature"] for one in opened.listed(sort, n, ascending=ascending)]
        given = label_features(opened, asked, ChatEndpoint(endpoint, label_model, os.environ.get(KEY_VARIABLE, "")))
        summary("labelled", given.facts(), as_json=json_output)
        return
    if search is not None:
        from .search import search as look_for

        found = look_for(opened.codes, opened.text, search, n, opened.effects)
        labels = opened.labels
        facts = _found_facts(search, found, labels)
        print(json.dumps(facts) if json_output else _found_text(search, found, labels))
    elif feature:
        views = opened.views(feature)
        print(json.dumps([one.facts() for one in views]) if json_output else "\n\n".join(map(_view_text, views)))
    else:
        listed = opened.listed(sort, n, ascending=ascending)
        print(json.dumps(listed) if json_output else _list_text(opened.survey, listed))


def _check_label(label: bool, endpoint: str | None, model: str | None) -> None:
    from ...errors import UsageError

    if label and (endpoint is None or model is None):
        raise UsageError("--label needs the address and the name of a model: --endpoint URL --label-model NAME")
    if not label and (endpoint is not None or model is not None):
        raise UsageError("--endpoint and --label-model are for --label: say it, too, or leave them out")


def _list_text(found: Survey, listed: list[dict[str, Any]]) -> str:
    heads = {"density": "density", "max_activation": "max", "mean_activation": "mean", "lag1_autocorrelation": "lag 1",
             "run_length": "run", "eta_squared": "eta²", "neighbour_cosine": "near", "together": "with"}  # fmt: skip
    lines = [f"{'feature':>8}" + "".join(f"{head:>9}" for head in heads.values())]
    for one in listed:
        lines.append(f"{one['feature']:>8}" + "".join(f"{_short(one[name]):>9}" for name in heads))
        lines += _wrapped(one["label"], 10) if one["label"] else []
    return "\n".join([*lines, f"{len(listed)} of {found.n_features} features, on {found.n_tokens} tokens that count"])


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _view_text(one: FeatureView) -> str:
    card, numbers = one.card, one.card.numbers
    lines = [f"feature {card.feature}", *(_wrapped(f"label: {one.label}", 2) if one.label else [])]
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

    margin = " " * indent
    return textwrap.wrap(visible(text), _WIDTH, initial_indent=margin, subsequent_indent=margin)


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


def _labelled(phrase: str, labels: Mapping[int, str]) -> list[int]:
    return [feature for feature, label in sorted(labels.items()) if phrase.lower() in label.lower()]


def _found_facts(phrase: str, found: Found, labels: Mapping[int, str]) -> dict[str, Any]:
    raises = [{"feature": feature, "token": token, "effect": effect} for feature, token, effect in found.raises]
    hits = [hit.facts() | {"label": labels.get(hit.feature)} for hit in found.hits]
    plain = {"occurrences": found.occurrences, "hits": hits, "raises": raises}
    return plain | {"labelled": _labelled(phrase, labels)}


def _found_text(phrase: str, found: Found, labels: Mapping[int, str]) -> str:
    times = "once" if found.occurrences == 1 else f"{found.occurrences} times"
    lines = [f"'{phrase}' stands {times} in the text" if found.occurrences else f"'{phrase}' is not in the text"]
    if found.hits:
        lines.append(f"{'feature':>8}{'score':>9}{'on it':>9}{'else':>9}{'active on':>11}{'share':>9}")
        for hit in found.hits:
            lines.append(
                f"{hit.feature:>8}{_short(hit.score):>9}{_short(hit.on_phrase):>9}{_short(hit.elsewhere):>9}"
                f"{hit.occurrences:>11.0%}{hit.share:>9.1%}"
            )
            lines += _wrapped(labels[hit.feature], 10) if hit.feature in labels else []
    for feature in _labelled(phrase, labels):
        lines += _wrapped(f"labelled so: {feature}, {labels[feature]}", 0)
    if found.raises:
        lines.append("raise its logits: " + ", ".join(f"{f} ({token!r} {e:.3g})" for f, token, e in found.raises))
    return "\n".join(lines)


COMMANDS = [features]
