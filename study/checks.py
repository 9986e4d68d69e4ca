"""What can be found wrong with a study before hours are spent on it."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import UsageError, needs
from ..evaluate.metrics.all import definitions, families
from ..plugins import load_plugins
from ..train.plan import MemberPlan, plan_together
from ..train.siblings import with_siblings
from .plan import StudyPlan, Training


def check_outcomes(plan: StudyPlan) -> None:
    """Whether an evaluation will measure every outcome.

    Raises:
        UsageError: there is no metric of that name.
        MissingPackageError: a metric needs a package that is not installed.

    """
    files = {file for text in plan.texts for file in text.evaluation.plugins}
    load_plugins(sorted(files))
    plugins = [Path(file).name for file in files]
    known = definitions(plugins)
    for outcome in plan.study.outcomes:
        # A part's metrics have its name behind that of the whole: explained_variance_inside.
        if outcome.metric not in known and not outcome.metric.startswith(tuple(f"{name}_" for name in known)):
            close = difflib.get_close_matches(outcome.metric, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "docs/METHOD.md lists them"
            raise UsageError(f"outcome '{outcome.metric}' is no metric of an evaluation: {remedy}")
        for name, family in families(plugins).items():
            if family.needs is not None and outcome.metric in family.definitions:
                package, extra = family.needs
                needs(package, extra=extra, what=f"the outcome {outcome.metric} (metric '{name}')")


def member_plans(training: Training, d_model: int, n_tokens: int, context: int) -> list[MemberPlan]:
    """The members as training plans them, which checks every configuration against the model and the rows.

    Raises:
        UsageError: one that makes no sense.

    """
    about = {"layer": training.at.layer, "site": training.at.site, "d_model": d_model, "n_tokens": n_tokens}
    return with_siblings(plan_together([each.config for each in training.members], {}, **about), context)
