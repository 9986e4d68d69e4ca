"""What an evaluation says: one frozen, typed document, written as ``results.json`` with a published JSON schema.

Every number carries its unit, the count it was divided by, its 95 % interval and the key of its definition. Undefined
is null: never −1, never left out. ``docs/results.schema.json`` is this file's schema; a test keeps the two in step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..cache.format.manifest import NO_MODEL
from ..errors import RunError, printable
from ..sites import RESIDUAL, Location
from ..system.atomic_files import write_json
from ..system.checksums import content_hash
from ..system.untrusted_files import read_json

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
OUTLIERS = "_without_outliers"
"""Ends the names of metrics without the tokens whose norm is outlying."""
BOOTSTRAP = "bootstrap over what the report's `resampling` names"
JACKKNIFE = "delete-a-group jackknife over the text"
NO_INTERVAL = "none:"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite_or_none)]


Role = Literal["tc", "twin", "pruned", "finetuned"]
MADE_OF_ANOTHER = ("pruned", "finetuned")
"""The roles of runs that a command made of another run, which is their pair."""


class Frozen(BaseModel):
    """A part of the document: immutable, and closed to fields nobody defined."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Definition(Frozen):
    """What a metric means."""

    text: str = Field(description="one or two sentences, with the formula")
    unit: str = Field(description="nats, activation units, tokens, share, 1 (a pure number), …")
    better: Literal["lower", "higher"] | None = Field(
        default=None, description="which direction is good; null where neither is"
    )
    label: str = Field(default="", description="a short name for tables; empty means the key itself")
    group: str = Field(
        default="",
        description="its group of columns in the report's main table: sparsity, fidelity …; empty: it stands in the "
        "table of all metrics only",
    )
    interval: str = Field(
        default=BOOTSTRAP, description="how the 95 % interval is made; beginning with `none:`, why there is none"
    )


class Metric(Frozen):
    """One number: its value, what it was averaged over, and a 95 % interval where there is one."""

    value: Number = Field(description="null where undefined (no token to average over, 0 / 0)")
    unit: str
    n: int = Field(description="how many tokens, pairs or features the value is an average over")
    low: Number = Field(
        default=None,
        description="lower end of the 95 % interval; null where the definition's `interval` says why, where the text "
        "is too short for one (the report's `resampling` says so), and where the value is undefined without some part "
        "of the text",
    )
    high: Number = Field(default=None, description="upper end of it, null in the same places")
    definition: str = Field(description="key into the report's definitions")


class Curve(Frozen):
    """A line, a band or a histogram that the report draws."""

    kind: Literal["line", "histogram"] = "line"
    x: list[Number] = Field(description="abscissae; for a histogram the bin edges, one more than y")
    y: list[Number]
    low: list[Number] | None = None
    high: list[Number] | None = None
    x_label: str
    y_label: str
    x_scale: Literal["linear", "log"] = "linear"
    definition: str = Field(description="key into the report's definitions")

    @classmethod
    def histogram(cls, edges: Iterable[float], counts: Iterable[float], **facts: Any) -> Curve:
        """Counts between edges; ``facts`` are the labels, the definition and the scale."""
        return cls(kind="histogram", x=[float(edge) for edge in edges], y=[float(count) for count in counts], **facts)


PathText = Annotated[str, BeforeValidator(lambda path: printable(str(path)))]
"""A path as text: of names in other encodings, what is no UTF-8 is written out."""


class SAEFacts(Frozen):
    """What is known of an SAE apart from its measurements; a reference row has no such facts."""

    path: PathText
    source: str = Field(description="run, or the format of files from elsewhere: saelens, gemma-scope …")
    architecture: str = Field(description="relu, topk, batchtopk, jumprelu, gated …")
    d_model: int
    n_features: int
    settings: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict, description="of the training: temporal form, weight, k, seed, tokens …"
    )


class Record(Frozen):
    """One row of the table: an SAE or a reference, at one layer."""

    name: str = Field(description="unique in the report together with the layer and the site")
    kind: Literal["sae", "reference"]
    layer: int
    site: str = Field(default=RESIDUAL, description="hook point there: resid_post, mlp_out …")
    role: Role | None = Field(
        default=None,
        description="with the temporal term, its twin without, or a run that `pipeline prune` or `pipeline finetune` "
        "made of another",
    )
    pair: str | None = Field(
        default=None,
        description="name of the other half: the twin of a tc, the tc of a twin, the original of a pruned or "
        "fine-tuned one",
    )
    sae: SAEFacts | None = None
    metrics: dict[str, Metric]
    curves: dict[str, Curve] = Field(default_factory=dict)
    saebench_compat: dict[str, Number] = Field(
        default_factory=dict,
        description="SAEBench 0.6.0 `core` names and conventions, for comparison with published tables",
    )
    notes: list[str] = Field(default_factory=list)
    kept: str = Field(
        default="",
        description="the file in the report's folder that holds its sums per unit of text; rows in one folder were "
        "measured on one text",
    )
    codes: str = Field(
        default="",
        description="the folder inside the report's that holds its codes on this text; empty: they were not kept",
    )

    @property
    def location(self) -> Location:
        """Layer and site."""
        return Location(self.layer, self.site)


class Paired(Frozen):
    """Differences first − second between two SAEs, token by token on the same text, with paired intervals."""

    kind: Literal["twin", "pruned", "finetuned"] = Field(
        default="twin", description="TC-SAE − twin, pruned − original, or fine-tuned − original"
    )
    first: str
    second: str
    layer: int
    site: str = Field(default=RESIDUAL, description="hook point there: resid_post, mlp_out …")
    metrics: dict[str, Metric]
    warning: str | None = Field(default=None, description="why the comparison is not on equal terms, e.g. another L0")

    @property
    def location(self) -> Location:
        """Layer and site."""
        return Location(self.layer, self.site)


class TrainingCurves(Frozen):
    """What training logged: one list per series, all as long as ``steps``."""

    steps: list[int]
    series: dict[str, list[Number]] = Field(description="loss terms by name, as logged in metrics.jsonl")


class Passage(Frozen):
    """A stretch of held-out text around a feature's strong activation."""

    tokens: list[str]
    activations: list[Number] = Field(description="the feature at every token of the stretch")
    peak: int = Field(description="index into tokens of the strongest")
    position: int = Field(description="of the first shown token in its row")
    document: int
    chosen: Literal["strongest", "random"] = Field(
        default="strongest", description="why this passage: the strongest alone make a feature look cleaner than it is"
    )


class Neighbour(Frozen):
    """Another feature of the same SAE and the cosine between the two decoder rows."""

    feature: int
    cosine: float


class LogitEffect(Frozen):
    """A token and how far the feature's decoder row pushes its logit."""

    token: str
    effect: float


class FeatureCard(Frozen):
    """What the feature browser shows of one feature."""

    feature: int
    why: str = Field(description="why this one was chosen: most frequent, most temporal, position-locked, random …")
    numbers: dict[str, Number] = Field(default_factory=dict, description="density, mean and maximum activation, η² …")
    passages: list[Passage] = Field(default_factory=list)
    position_profile: Curve | None = None
    lag_curve: Curve | None = None
    neighbours: list[Neighbour] = Field(default_factory=list)
    raises: list[LogitEffect] = Field(default_factory=list)
    lowers: list[LogitEffect] = Field(default_factory=list)


class ModelFacts(Frozen):
    """The language model that was evaluated in."""

    id: str
    revision: str | None = None
    fingerprint: str
    architecture: str
    n_layers: int
    d_model: int
    vocab_size: int
    attn_implementation: str
    dtype: str
    load_in: str = Field(default="", description="8bit or 4bit where its weights were quantised by bitsandbytes")

    @property
    def predicts_tokens(self) -> bool:
        """Whether it is a language model; false of the network or file that imported vectors are of."""
        return self.architecture != NO_MODEL


class TextFacts(Frozen):
    """The held-out text that was evaluated on."""

    dataset: str
    split: str | None = None
    revision: str | None = None
    fingerprint: str
    packing: str
    context: int
    held_out: float
    labels: list[str] = Field(
        default_factory=list, description="of its documents: topics, say; empty where it has none"
    )


class Failure(Frozen):
    """An SAE that was asked for and could not be evaluated."""

    path: PathText
    message: str


class EvaluationReport(Frozen):
    """Everything one ``pipeline evaluate`` found."""

    schema_version: int = SCHEMA_VERSION
    name: str
    created: str = Field(description="ISO 8601, UTC")
    machine: dict[str, str | int | float | None] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    plugins: dict[str, str] = Field(
        default_factory=dict, description="plug-in files that were loaded: name → SHA-256 of the file"
    )
    model: ModelFacts
    text: TextFacts
    n_documents: int
    n_rows: int
    n_tokens: int = Field(
        description="valid tokens: not special, not padding; the n of a metric says what it used of them"
    )
    seed: int
    layers: list[int]
    resampling: str = Field(description="what the intervals resample: documents, or blocks of about a thousand tokens")
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    definitions: dict[str, Definition] = Field(default_factory=dict)
    records: list[Record]
    paired: list[Paired] = Field(default_factory=list)
    training: dict[str, TrainingCurves] = Field(default_factory=dict, description="by record name")
    features: dict[str, list[FeatureCard]] = Field(default_factory=dict, description="the browser, by record name")
    failures: list[Failure] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    checksum: str | None = Field(default=None, description="in the file: XXH3 (128 bits) of everything else in it")

    def record(self, name: str, layer: int, site: str = RESIDUAL) -> Record | None:
        """The row of that name, layer and site, or None."""
        at = Location(layer, site)
        return next((record for record in self.records if record.name == name and record.location == at), None)

    @property
    def sites(self) -> list[str]:
        """The sites of its rows: the residual stream first, the others by name."""
        return sorted({record.site for record in self.records}, key=lambda site: (site != RESIDUAL, site))

    @property
    def locations(self) -> list[Location]:
        """Where its rows are, by layer; of one layer the residual stream first."""
        found = {record.location for record in self.records}
        return sorted(found, key=lambda at: (at.layer, at.site != RESIDUAL, at.site))

    def of_site(self, site: str) -> EvaluationReport:
        """The part of the report that is about one site: rows at two sites of a layer are not comparable."""
        records = [record for record in self.records if record.site == site]
        layers = sorted({record.layer for record in records})
        pairs = [pair for pair in self.paired if pair.site == site]
        return self.model_copy(update={"records": records, "layers": layers, "paired": pairs})


def write_results(report: EvaluationReport, folder: str | Path) -> Path:
    """Write ``results.json`` whole or not at all, with its checksum; returns its path."""
    content = json.loads(report.model_dump_json(exclude={"checksum"}))
    content["checksum"] = content_hash(content)
    return write_json(Path(folder) / RESULTS_FILE, content, indent=1, ascii_only=False)


def read_results(path: str | Path) -> EvaluationReport:
    """Read a results.json, or the one in a report's folder.

    Raises:
        RunError: there is none, it is damaged, or a newer version wrote it.

    """
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    found = read_json(
        file,
        missing=f"no results at {file}; write them with `pipeline evaluate`",
        remedy="evaluate again to replace it",
    )
    version = found.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RunError(f"{file} has schema version {version}, this program reads up to {SCHEMA_VERSION}; upgrade it")
    checksum = found.pop("checksum", None)
    if checksum is not None and checksum != content_hash(found):
        what = f"{file} is damaged or was changed (it does not have the checksum it says)"
        raise RunError(f"{what}; evaluate again to replace it, or take 'checksum' out of it if you changed it")
    try:
        return EvaluationReport.model_validate(found)
    except ValidationError as reasons:
        first = reasons.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(
            f"{file} is no evaluation result: {where}: {first['msg']}; evaluate again to replace it"
        ) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``results.json``, as published in ``docs/results.schema.json``."""
    return EvaluationReport.model_json_schema()


def publish_schema(path: str | Path) -> Path:
    """Write the schema, after a change of this file: ``python -m tcsae.evaluate.results docs/results.schema.json``."""
    return write_json(path, json_schema(), indent=1, ascii_only=False)


if __name__ == "__main__":
    import sys

    publish_schema(sys.argv[1])
