"""Every feature of one run or several as a folder to open in a browser, from a file:// address too.

The page holds no data. What is asked for is loaded then, as small scripts: a column of numbers, a few features, some
rows of text, the words that begin with two letters.

Shapes: T positions, F features.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...console import format_bytes, progress
from ...errors import RunError, UsageError
from ...system.atomic_files import PARTIAL, make_folder, plain_errors, remove_partials, write_file
from ...train.run_folder.record import RECORD, load_run
from ...train.sae.protocol import SparseAutoencoder
from ..codes.beside_report import kept_beside
from ..codes.format import DEFAULT_NAME
from ..report.page import asset as report_asset
from ..report.page import colours, page_environment, write_report
from ..results import read_results
from .catalogue import CodedRun, open_run
from .look import Stretch, histogram, places_of, stretches
from .page_data import LEVELS, Words, embedded, figures
from .survey import NUMBERS, nearest_rows

PAGE = "index.html"
DATA = "data"
FOLDER = "features"
"""Inside a report."""
FEATURES_PER_FILE, ROWS_PER_FILE = 16, 16
STRONGEST_OF_ROW = 24
LISTED = ("density", "max_activation", "lag1_autocorrelation", "eta_squared")
"""Columns of the list before another one is chosen."""
_POINTS = 64  # of a curve
_FEATURES_AT_ONCE = 4096  # whose passages are in memory
_MOST_OF_WORD = 60  # features listed for a word
_ON_WORD = 0.5  # share of its largest activation from which a feature is listed for a word
_OTHER = "other"  # the file of words that do not begin with two of a–z, 0–9
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class FeaturesFolder:
    """What was written."""

    page: Path
    runs: int
    features: int
    files: int
    n_bytes: int
    opening_bytes: int
    """What a browser reads until the list and the first feature are there."""

    def facts(self, *, as_json: bool) -> dict[str, Any]:
        """For the summary."""
        plain = {"page": str(self.page), "runs": self.runs, "features": self.features, "files": self.files}
        if as_json:
            return plain | {"bytes": self.n_bytes, "opening_bytes": self.opening_bytes}
        return plain | {"disk": format_bytes(self.n_bytes), "to open": format_bytes(self.opening_bytes)}


def write_features(
    runs: Sequence[str],
    *,
    out: str | None = None,
    report: str | None = None,
    codes: str | None = None,
    rows: int = 2000,
) -> FeaturesFolder:
    """Write the folder; a twin whose codes are there comes along, and a report gets a link.

    Args:
        runs: folders of runs whose codes are written.
        out: the folder; None: ``features`` in the report, or ``reports/RUN/features``.
        report: folder of an evaluation.
        codes: the codes of the only run, where they are not in its folder.
        rows: how many rows of text can be looked at whole.

    Raises:
        StoreError: a run has no codes.
        RunError: codes of different text, a folder with other things in it, or one that cannot be written.

    """
    home = Path(report) if report is not None else Path("reports") / Path(runs[0]).resolve().name
    if report is not None:
        read_results(home)  # before anything is written
    folder = Path(out) if out is not None else home / FOLDER
    opened = [open_run(path, codes=codes, report=report) for path in _with_twins(runs, codes, report)]
    _check_same_text(opened)
    _clear(folder)
    found = _Folder(folder, opened, rows).write()
    if report is not None and folder.resolve() == (home / FOLDER).resolve():
        write_report(read_results(home), home)  # with its link
    return found


def _with_twins(runs: Sequence[str], codes: str | None, report: str | None) -> list[str]:
    """The runs, and behind each the other run of its pair if that has codes in the same kind of place."""
    out: dict[Path, str] = {}
    for path in runs:
        out.setdefault(Path(path).resolve(), str(path))
        twin = load_run(path).twin
        beside = Path(path).resolve().parent / twin if twin else None
        if codes is None and beside is not None and (beside / RECORD).is_file() and _coded(path, beside, report):
            out.setdefault(beside, str(Path(path).parent / beside.name))
    return list(out.values())


def _coded(run: str, twin: Path, report: str | None) -> bool:
    if kept_beside(run, report) is not None:
        return kept_beside(twin, report) is not None
    return (twin / DEFAULT_NAME / "zarr.json").is_file()


def _check_same_text(opened: Sequence[CodedRun]) -> None:
    first = opened[0].codes
    for other in opened[1:]:
        one, two = first.manifest, other.codes.manifest
        names = ("dataset", "fingerprint", "context", "packing", "seed")
        texts = [[getattr(each.of_store.text, name) for name in names] for each in (one, two)]
        places = [(each.first_row, each.planned_rows) for each in (one, two)]
        if texts[0] != texts[1] or places[0] != places[1] or one.kept_by != two.kept_by:
            raise RunError(
                f"{first.path} holds rows {places[0][0]} to {sum(places[0])} of {texts[0][0]}, {other.codes.path} rows "
                f"{places[1][0]} to {sum(places[1])} of {texts[1][0]}: encode both over the same rows to see them side "
                "by side"
            )


def _clear(folder: Path) -> None:
    """Empty a folder of ours; refuse any other."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    whole = [file.name for file in folder.iterdir() if file.suffix != PARTIAL]  # others were left by a killed process
    other = sorted(name for name in whole if name not in (PAGE, DATA))
    if other or ((folder / PAGE).exists() and _MARK not in (folder / PAGE).read_text(errors="replace")):
        raise UsageError(f"{folder} holds other things ({(other or [PAGE])[0]}): choose another --out")
    with plain_errors(f"empty {folder}"):
        (folder / PAGE).unlink(missing_ok=True)
        shutil.rmtree(folder / DATA, ignore_errors=True)
        remove_partials(folder)


_MARK = '<meta name="generator" content="tcsae features">'


class _Folder:
    """The folder on its way to the disk."""

    def __init__(self, folder: Path, runs: Sequence[CodedRun], rows: int):
        self._folder, self._runs, self._rows = folder, runs, min(rows, runs[0].codes.n_rows)
        self._sizes: dict[str, int] = {}

    def write(self) -> FeaturesFolder:
        """Data first, the page last: it is there only if everything is."""
        features = sum(run.survey.n_features for run in self._runs)
        matched = _matches(self._runs)
        shown = []
        with progress("pages", features, unit="features") as bar:
            for at, run in enumerate(self._runs):
                columns = self._columns(at, run, matched)
                words = _WordIndex()
                for page in _feature_pages(run, {b: found for (a, b), found in matched.items() if a == at}, words):
                    self._script(f"{at}/f/{page['n']}", page["data"])
                    bar.advance(len(page["data"]["f"]))
                buckets = [self._script(f"{at}/w/{name}", entries) for name, entries in words.files()]
                for n, data in _row_pages(run, self._rows):
                    self._script(f"{at}/d/{n}", data)
                shown.append(_about(run, columns, [key.rsplit("/", 1)[1] for key in buckets]))
        page = render_page(self._runs[0], shown, self._rows)
        path = write_file(self._folder / PAGE, page)
        match = [f"{b}/f/{int(numbers[0]) // FEATURES_PER_FILE}" for (a, b), (numbers, _) in matched.items() if a == 0]
        opening = [f"0/c/{name}" for name in LISTED] + ["0/f/0", *match]
        return FeaturesFolder(
            page=path,
            runs=len(self._runs),
            features=features,
            files=len(self._sizes) + 1,
            n_bytes=sum(self._sizes.values()) + len(page.encode()),
            opening_bytes=len(page.encode()) + sum(self._sizes.get(key, 0) for key in opening),
        )

    def _columns(self, at: int, run: CodedRun, matched: Mapping[tuple[int, int], Any]) -> list[str]:
        numbers = dict(run.survey.numbers())
        others = [found for (a, _), found in matched.items() if a == at]
        if others:
            numbers["match_cosine"] = np.max([cosine_F for _, cosine_F in others], axis=0)
        for name, values_F in numbers.items():
            self._script(f"{at}/c/{name}", base64.b64encode(values_F.astype("<f4").tobytes()).decode())
        return list(numbers)

    def _script(self, key: str, value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        content = f"tcsaeData({json.dumps(key)},{text});\n".encode()
        file = self._folder / DATA / f"{key}.js"
        make_folder(file.parent)
        with plain_errors(f"write {file}"):
            file.write_bytes(content)  # the page, which is written last and durably, is what vouches for all of them
        self._sizes[key] = len(content)
        return key


def _matches(runs: Sequence[CodedRun]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """(run, other run) → per feature the other's nearest decoder row and the cosine."""
    rows = [SparseAutoencoder.load(run.path).token_coder().W_dec.detach() for run in runs] if len(runs) > 1 else []
    found = {}
    for a, ours in enumerate(rows):
        for b, theirs in enumerate(rows):
            if a != b and ours.shape[1] == theirs.shape[1]:
                numbers, cosines = nearest_rows(ours, theirs, 1)
                found[a, b] = numbers[:, 0], cosines[:, 0]
    return found


def _about(run: CodedRun, columns: Sequence[str], buckets: Sequence[str]) -> dict[str, Any]:
    manifest = run.codes.manifest
    return {
        "name": run.record.name,
        "label": f"layer {manifest.location}, {run.record.name}",
        "role": run.record.role,
        "features": run.survey.n_features,
        "columns": list(columns),
        "words": list(buckets),
    }


def render_page(run: CodedRun, shown: Sequence[Mapping[str, Any]], rows: int) -> str:
    """The page of the folder; ``shown``: what it is told of every run."""
    manifest = run.codes.manifest
    store = manifest.of_store
    seen = manifest.trained_rows
    of_training = (
        "on text that the run was trained on"
        if seen >= run.codes.n_rows
        else "on text that training did not see"
        if not seen
        else f"on text of which training saw the first {seen} rows"
    )
    index = {
        "runs": list(shown),
        "rows": rows,
        "context": run.codes.context,
        "perFile": FEATURES_PER_FILE,
        "rowsPerFile": ROWS_PER_FILE,
        "listed": list(LISTED),
        "meanings": NUMBERS | {"match_cosine": "cosine with the nearest decoder row of another run on this page"},
    }
    return (
        page_environment(TEMPLATES)
        .get_template("features.html.j2")
        .render(
            mark=_MARK,
            model=store.model.id,
            dataset=store.text.dataset,
            location=manifest.location,
            tokens=f"{run.survey.n_tokens:,}",
            of_training=of_training,
            colours=colours(),
            css=report_asset("report.css"),
            own_css=_asset("features.css"),
            js=report_asset("dom.js") + _asset("features.js"),
            index=embedded(index),
            report="../index.html" if run.report is not None else None,
        )
    )


def _asset(name: str) -> Any:
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 - our own file


def _feature_pages(
    run: CodedRun, matched: Mapping[int, tuple[np.ndarray, np.ndarray]], words: _WordIndex
) -> Iterator[dict[str, Any]]:
    """Files of a few features each; what they fire on is put into ``words`` on the way."""
    size, context = run.survey.n_features, run.codes.context
    for first in range(0, size, _FEATURES_AT_ONCE):
        some = range(first, min(first + _FEATURES_AT_ONCE, size))
        found = stretches(run.codes, {feature: places_of(run.survey, feature, context) for feature in some})
        for start in range(some.start, some.stop, FEATURES_PER_FILE):
            of_file, text = Words(), run.text
            cards = []
            for feature in range(start, min(start + FEATURES_PER_FILE, some.stop)):
                words.add(feature, found[feature], text)
                words.add_label(feature, run.labels.get(feature, ""))
                match = [[b, int(f[feature]), figures(float(c[feature]))] for b, (f, c) in matched.items()]
                cards.append(_card(run, feature, found[feature], of_file, match))
            yield {"n": start // FEATURES_PER_FILE, "data": {"words": of_file.list, "f": cards}}


def _card(run: CodedRun, feature: int, found: Sequence[Stretch], words: Words, match: list[Any]) -> dict[str, Any]:
    survey = run.survey
    top = float(survey.max_activation_F[feature])
    raises, lowers = run.effects.get(feature, ([], []))
    numbers = {name: _number(values_F[feature]) for name, values_F in survey.numbers().items()}
    label = run.labels.get(feature)
    return {
        "id": feature,
        **({"label": label} if label else {}),
        "n": {name: value for name, value in numbers.items() if value is not None},
        "top": figures(top) if np.isfinite(top) else 0,
        "p": [_passage(stretch, top, words, run.text) for stretch in found],
        "h": [[figures(low), count] for low, count in histogram(survey, feature)],
        "pos": _points(survey.position_mean_FT[feature], 0),
        "lag": _points(survey.lag_autocorrelation_FL[feature], 1),
        "near": _pairs(survey.neighbour_FC[feature], survey.neighbour_cosine_FC[feature]),
        "with": _pairs(survey.together_FC[feature], survey.together_value_FC[feature]),
        "match": match,
        "up": [[words(effect.token), figures(effect.effect)] for effect in raises],
        "down": [[words(effect.token), figures(effect.effect)] for effect in lowers],
    }


def _number(value: Any) -> float | int | None:
    return figures(float(value)) if np.isfinite(value) else None


def _pairs(numbers: np.ndarray, values: np.ndarray) -> list[list[Any]]:
    return [[int(f), figures(float(v))] for f, v in zip(numbers, values, strict=True) if f >= 0]


def _passage(stretch: Stretch, top: float, words: Words, text: Callable[[int], str]) -> dict[str, Any]:
    """As in the report's page: tokens by index, activations in hundredths of the largest."""
    out = {
        "r": stretch.place.row,
        "d": stretch.document,
        "s": stretch.start,
        "k": stretch.place.position - stretch.start,
        "t": [words(text(int(token))) for token in stretch.tokens],
        "a": levels(stretch.values, top).tolist(),
    }
    return out if stretch.place.chosen == "strongest" else out | {"c": 1}


def levels(values: np.ndarray, top: float) -> np.ndarray:
    """Hundredths of the largest activation; what is above zero never rounds to it."""
    return np.ceil(LEVELS * np.maximum(values, 0) / top).astype(int) if top > 0 else np.zeros(len(values), int)


def _points(values: np.ndarray, first: int) -> dict[str, Any] | None:
    """A curve of at most so many points, the means of neighbouring ones where there are more."""
    step = -(-len(values) // _POINTS)
    padded = np.pad(values.astype(float), (0, -len(values) % step), constant_values=np.nan).reshape(-1, step)
    counts = np.isfinite(padded).sum(1)
    means = np.divide(np.nansum(padded, 1), counts, out=np.full(len(counts), np.nan), where=counts > 0)
    if not counts.any():
        return None
    return {"x": [first + at * step for at in range(len(means))], "y": [_number(value) for value in means]}


class _WordIndex:
    """Which features fire on which words of their passages, in files by the words' first two letters."""

    def __init__(self) -> None:
        self._words: dict[str, dict[int, int]] = {}

    def add(self, feature: int, found: Sequence[Stretch], text: Callable[[int], str]) -> None:
        """Take the passages of a feature in."""
        top = max((float(stretch.values.max()) for stretch in found), default=0.0)
        if top <= 0:
            return
        for stretch in found:
            pieces = [text(int(token)) for token in stretch.tokens]
            for word, value in words_of(pieces, stretch.values, _ON_WORD * top):
                features = self._words.setdefault(word, {})
                features[feature] = max(features.get(feature, 0), round(LEVELS * value / top))

    def add_label(self, feature: int, label: str) -> None:
        """Take the words of a label in, as if it were fully active on them."""
        for word in {match[0].lower() for match in _WORD.finditer(label)}:
            self._words.setdefault(word, {})[feature] = LEVELS

    def files(self) -> Iterator[tuple[str, list[Any]]]:
        """(name, [[word, [feature, level, …]], …]) of every file."""
        files: dict[str, list[Any]] = {}
        for word in sorted(self._words):
            best = sorted(self._words[word].items(), key=lambda each: (-each[1], each[0]))[:_MOST_OF_WORD]
            files.setdefault(bucket(word), []).append([word, [n for pair in best for n in pair]])
        yield from sorted(files.items())


def bucket(word: str) -> str:
    """The file that a word is in."""
    start = word[:2]
    return start if len(start) == 2 and start.isascii() and start.isalnum() else _OTHER


def words_of(pieces: Sequence[str], values: np.ndarray, least: float = -np.inf) -> Iterator[tuple[str, float]]:
    """Words in lower case, without the marks around them, with the largest activation on any of their tokens.

    Args:
        pieces: tokens as text.
        values: the activation on each.
        least: words of a smaller one are left out.

    """
    found = list(_WORD.finditer("".join(pieces)))
    if not found:
        return
    ends = np.cumsum([len(piece) for piece in pieces])
    first_W = np.searchsorted(ends, [match.start() for match in found], side="right")
    last_W = np.searchsorted(ends, [match.end() - 1 for match in found], side="right")
    # The largest of every stretch first … last at once: of pairs of bounds, every second result is between two words.
    bounds = np.stack([first_W, last_W + 1], axis=1).reshape(-1)
    most_W = np.maximum.reduceat(np.append(values, -np.inf), bounds)[::2]
    for at in np.flatnonzero(most_W >= least):
        yield found[at][0].lower(), float(most_W[at])


# Letters and digits, and what joins them inside a word: well-known, o'clock, 3.5.
_WORD = re.compile(r"\w+(?:[-'’.]\w+)*")


def _row_pages(run: CodedRun, rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Files of a few rows each: their text and their strongest features over time."""
    w_dec_FD = SparseAutoencoder.load(run.path).token_coder().W_dec.detach()
    norm_F, tops_F = w_dec_FD.norm(dim=1).numpy(), run.survey.max_activation_F
    words, shown = Words(), []
    for part in run.codes:
        for row in range(len(part.tokens_RT)):
            number = part.first_row + row
            if number >= rows:
                break
            shown.append(_row(part.rows(row, row + 1), norm_F, tops_F, words, run.text))
            if len(shown) == ROWS_PER_FILE or number == rows - 1:
                yield number // ROWS_PER_FILE, {"words": words.list, "rows": shown}
                words, shown = Words(), []


def _row(part: Any, norm_F: np.ndarray, tops_F: np.ndarray, words: Words, text: Callable[[int], str]) -> dict[str, Any]:
    strength_F = np.bincount(part.feature_E, part.value_E * norm_F[part.feature_E], len(norm_F))
    best = np.argsort(-strength_F, kind="stable")[:STRONGEST_OF_ROW]
    best = best[strength_F[best] > 0]
    features = np.sort(best)
    z_TC = part.dense_row(0, features) if len(features) else np.zeros((part.tokens_RT.shape[1], 0))
    strips = []
    for feature in best:
        level_T = levels(z_TC[:, np.searchsorted(features, feature)], float(tops_F[feature]))
        at = np.flatnonzero(level_T)
        strips.append([int(feature), figures(float(tops_F[feature])), np.stack([at, level_T[at]], 1).ravel().tolist()])
    documents_T = part.documents_RT[0]
    return {
        "r": part.first_row,
        "d": [int(documents_T.min()), int(documents_T.max())],
        "t": [words(text(int(token))) for token in part.tokens_RT[0]],
        "v": np.flatnonzero(part.flags_RT[0]).tolist(),
        "s": strips,
    }
