"""What an effect would be on another text and with other seeds: one estimate from a number per seed and its resamples.

Two things vary: the seed of the training, and the text. They are crossed, since every seed is measured on the same
documents; so a resample draws documents once, for all seeds and all variants ("pigeonhole bootstrap", Owen 2007,
arXiv 0712.1111). Three seeds are too few to be drawn again themselves: their plain bootstrap excludes zero whenever all
three have one sign, which happens in a quarter of studies without any effect. So the interval adds to every
resample of the text a draw of Student's t for the mean of the seeds. The plain bootstrap is kept beside it.

Shapes: R resamples, S seeds, G groups (documents, or units where there are few documents), U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
from pydantic import Field

from ...evaluate.intervals.bootstrap import Resampler
from ...evaluate.intervals.jackknife import GROUPS
from ...evaluate.results import Frozen, Number
from .observations import Observed, ObservedText

_FINER = 64  # draws of Student's t per resample that its quantiles are taken from: its tails are heavy


@dataclass(frozen=True)
class Sampled:
    """A number per seed, and what it is in every resample of the text."""

    seeds: tuple[int, ...]
    values_S: np.ndarray
    draws_RS: np.ndarray | None
    """None: the text was not resampled, and ``why`` says why."""
    text: str = ""
    """What the resamples of the text are drawn over."""
    why: str = ""

    def with_(self, other: Sampled, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Sampled:
        """``combine(self, other)`` of the same seeds, resample by resample."""
        if self.seeds != other.seeds:
            raise ValueError("only numbers of the same seeds can be combined")
        draws_RS = None
        if self.draws_RS is not None and other.draws_RS is not None:
            draws_RS = combine(self.draws_RS, other.draws_RS)
        text = self.text if other.text in self.text else f"{self.text} and {other.text}"
        why = self.why or other.why
        return Sampled(self.seeds, combine(self.values_S, other.values_S), draws_RS, text, why)

    def __sub__(self, other: Sampled) -> Sampled:
        return self.with_(other, np.subtract)

    def relative_to(self, other: Sampled) -> Sampled:
        """The ratio to the other, less 1."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.with_(other, lambda a, b: a / b - 1)

    def of(self, seeds: Sequence[int]) -> Sampled:
        """The same for some of the seeds."""
        at = [self.seeds.index(seed) for seed in seeds]
        draws_RS = None if self.draws_RS is None else self.draws_RS[:, at]
        return Sampled(tuple(seeds), self.values_S[at], draws_RS, self.text, self.why)


def mean_over_places(parts: Sequence[Sampled]) -> Sampled:
    """The mean of numbers of the same seeds at several places. The places are fixed, they are not drawn again."""
    total = parts[0]
    for part in parts[1:]:
        total = total.with_(part, np.add)
    draws_RS = None if total.draws_RS is None else total.draws_RS / len(parts)
    return Sampled(total.seeds, total.values_S / len(parts), draws_RS, total.text, total.why)


class Estimate(Frozen):
    """An effect or a level: the mean over seeds, with an interval over seeds and text."""

    value: Number
    low: Number = Field(default=None, description="null where there is no interval; `levels` says why")
    high: Number = None
    p: Number = Field(default=None, description="two-sided, of the hypothesis that the value is zero")
    seeds: list[int]
    by_seed: list[Number]
    positive: int = Field(description="seeds with a value above zero")
    negative: int
    text_low: Number = Field(default=None, description="the interval if these seeds were the only ones")
    text_high: Number = None
    plain_low: Number = Field(default=None, description="the plain hierarchical bootstrap, too narrow with few seeds")
    plain_high: Number = None
    levels: str = Field(description="what the interval covers, or why there is none")

    @property
    def least(self) -> float | None:
        """Of the seeds' values."""
        return min((v for v in self.by_seed if v is not None), default=None)

    @property
    def most(self) -> float | None:
        """Of the seeds' values."""
        return max((v for v in self.by_seed if v is not None), default=None)


@dataclass
class Sampling:
    """The draws of a study: the same for everything that was measured on one text.

    Args:
        resamples: R.
        seed: of the draws.
        alpha: the intervals cover 1 − alpha.

    """

    resamples: int
    seed: int
    alpha: float
    _documents: dict[str, Resampler] = field(default_factory=dict)
    _students: dict[int, np.ndarray] = field(default_factory=dict)

    def resampler(self, text: ObservedText) -> Resampler:
        """How often each document, or unit where there are few, appears in each resample."""
        if text.key not in self._documents:
            self._documents[text.key] = Resampler.of(
                text.documents_U, self._seed("documents", text.key), self.resamples
            )
        return self._documents[text.key]

    def sampled(self, observed: Sequence[Observed], seeds: Sequence[int], text: ObservedText) -> Sampled:
        """One metric of one variant: a number per seed with its resamples of the text."""
        values_S = np.array([np.nan if one.value is None else one.value for one in observed])
        draws, what = self._text_level(observed, text)
        if draws is None:
            return Sampled(tuple(seeds), values_S, None, why=what)
        return Sampled(tuple(seeds), values_S, draws, text=what)

    def _text_level(self, observed: Sequence[Observed], text: ObservedText) -> tuple[np.ndarray | None, str]:
        if all(one.numerator_U is not None for one in observed):
            resampler = self.resampler(text)
            if not len(resampler.counts_RG):
                return None, f"too little text for an interval ({text.n_documents} documents)"
            return _ratios(observed, resampler), resampler.what
        groups = {tuple(one.left_out) for one in observed}
        if len(groups) == 1 and len(next(iter(groups))) > 1:
            return self._jackknife(observed, text), f"{len(next(iter(groups)))} groups of the text (jackknife)"
        return None, "the metric is no average over text, so it varies by seed alone"

    def _jackknife(self, observed: Sequence[Observed], text: ObservedText) -> np.ndarray:
        """Draws whose spread is the jackknife's: linear in the left-out values, so that differences stay paired."""
        groups = list(observed[0].left_out)
        left_out_GS = np.array([[one.left_out[g] for one in observed] for g in groups])
        df = len(groups) - 1
        # Normal weights per group of the text, and one chi-square per resample: together Student's t with df.
        generator = np.random.default_rng(self._seed("jackknife", text.key))
        weight_RG = generator.standard_normal((self.resamples, GROUPS))[:, groups]
        spread_R = np.sqrt(np.random.default_rng(self._seed("spread", df)).chisquare(df, self.resamples) / df)
        deviation_GS = (left_out_GS - left_out_GS.mean(0)) * np.sqrt(df / len(groups))
        values_S = np.array([one.value for one in observed])
        return values_S + (weight_RG / spread_R[:, None]) @ deviation_GS

    def estimate(self, sampled: Sampled) -> Estimate:
        """The mean over seeds with its interval."""
        values_S, seeds = sampled.values_S, list(sampled.seeds)
        n = len(values_S)
        about = {
            "seeds": seeds,
            "by_seed": [float(v) for v in values_S],
            "positive": int((values_S > 0).sum()),
            "negative": int((values_S < 0).sum()),
        }
        if not n or not np.isfinite(values_S).all():
            return Estimate(value=None, levels="undefined: no seed has it", **about)
        value, text_R = float(values_S.mean()), None
        if sampled.draws_RS is not None:
            text_R = sampled.draws_RS.mean(1)
            low, high = self._ends(text_R)
            about |= {"text_low": low, "text_high": high}
        if n == 1:
            return Estimate(value=value, levels="one seed: no interval over seeds exists", **about)
        drawn_R = self._student(n - 1) * values_S.std(ddof=1) / np.sqrt(n) + (value if text_R is None else text_R)
        plain_low, plain_high = self._ends(self._plain(sampled))
        low, high = self._ends(drawn_R)
        levels = f"{n} seeds and {sampled.text}" if text_R is not None else f"{n} seeds alone: {sampled.why}"
        if text_R is None and sampled.why.startswith("too little text"):
            return Estimate(value=value, levels=sampled.why, **about)
        return Estimate(
            value=value,
            low=low,
            high=high,
            p=None if low is None else self.p_value(drawn_R, 0.0),
            plain_low=plain_low,
            plain_high=plain_high,
            levels=levels,
            **about,
        )

    def p_against(self, sampled: Sampled, reference: float) -> float | None:
        """Two-sided p of the hypothesis that the mean is ``reference``; None where there is no interval."""
        draws_RS = None if sampled.draws_RS is None else sampled.draws_RS - reference
        return self.estimate(replace(sampled, values_S=sampled.values_S - reference, draws_RS=draws_RS)).p

    def p_value(self, draws_R: np.ndarray, reference: float) -> float:
        """The smallest alpha at which the interval of these draws leaves out ``reference``."""
        below, above = int((draws_R <= reference).sum()), int((draws_R >= reference).sum())
        return min(1.0, 2 * (1 + min(below, above)) / (1 + len(draws_R)))

    def _plain(self, sampled: Sampled) -> np.ndarray:
        """The hierarchical bootstrap: seeds drawn again, and the documents for all of them at once [R]."""
        n = len(sampled.values_S)
        chosen_RS = np.random.default_rng(self._seed("seeds", n)).integers(0, n, (self.resamples, n))
        if sampled.draws_RS is None:
            return sampled.values_S[chosen_RS].mean(1)
        return np.take_along_axis(sampled.draws_RS, chosen_RS, axis=1).mean(1)

    def _student(self, df: int) -> np.ndarray:
        """Draws of Student's t [R]: evenly spaced quantiles of many more, in random order."""
        if df not in self._students:
            generator = np.random.default_rng(self._seed("student", df))
            fine = np.sort(generator.standard_t(df, self.resamples * _FINER)).reshape(self.resamples, _FINER)
            self._students[df] = generator.permutation(fine[:, _FINER // 2])
        return self._students[df]

    def _ends(self, draws_R: np.ndarray) -> tuple[float | None, float | None]:
        """The interval; none where a resample is undefined."""
        if not np.isfinite(draws_R).all():
            return None, None
        low, high = np.quantile(draws_R, (self.alpha / 2, 1 - self.alpha / 2))
        return float(low), float(high)

    def _seed(self, *what: object) -> int:
        return int.from_bytes(sha256(repr((self.seed, *what)).encode()).digest()[:8], "big")


def _ratios(observed: Sequence[Observed], resampler: Resampler) -> np.ndarray:
    """The metric of every seed in every resample [R, S]; NaN where its denominator vanishes."""
    n = resampler.counts_RG.shape[1]
    sums_GS = [
        np.stack([np.bincount(resampler.group_U, weights=getattr(one, side), minlength=n) for one in observed], axis=1)
        for side in ("numerator_U", "denominator_U")
    ]
    above_RS, below_RS = (resampler.counts_RG @ part for part in sums_GS)
    offset_S, scale_S = (np.array([getattr(one, name) for one in observed]) for name in ("offset", "scale"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return offset_S + scale_S * above_RS / below_RS
