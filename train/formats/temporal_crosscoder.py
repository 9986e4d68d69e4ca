"""Temporal crosscoders as TempBench's authors publish them (repository chainik1125/temp_xc): ``ckpts/NAME.pt`` and
``training_logs/NAME.json``. Read only.

Shapes there: W_enc [W, D, F], W_dec [F, W, D], b_enc [F], b_dec [W, D], in half precision.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import RunError
from ...system.untrusted_files import read_json, shown
from ..sae.txc import TemporalCrosscoder
from .from_weights import count, filled, place_of
from .registry import SAEFormat, sae_format
from .tensor_files import read_torch

LOGS = "training_logs"
_CLASSES = ("TXCBareAntidead", "TemporalCrosscoder")  # with and without AuxK; what they compute is the same
_STATE = ("W_enc", "W_dec", "b_enc", "b_dec")


@sae_format("temporal-crosscoder")
class PublishedCrosscoder(SAEFormat):
    """A ``.pt`` file whose log lies beside it, or in the folder ``training_logs`` beside its own."""

    files = ("NAME.pt", f"{LOGS}/NAME.json")

    def matches(self, path: Path) -> bool:
        """A ``.pt`` file with such a log."""
        return path.suffix == ".pt" and _log(path) is not None

    def companions(self, inside: str) -> tuple[str, ...]:
        """The log of ``ckpts/NAME.pt``."""
        path = PurePosixPath(inside)
        return (f"{LOGS}/{path.stem}.json",) if path.suffix == ".pt" and path.parent.name == "ckpts" else ()

    def read(self, path: Path) -> TemporalCrosscoder:
        """A crosscoder with topk over each window; other classes of the repository are refused by name."""
        log = _log(path)
        if log is None:
            raise RunError(f"{shown(path)} has no log beside it ({LOGS}/{shown(path.stem)}.json): fetch it too")
        said = read_json(log)
        if (kind := said.get("src_class")) not in _CLASSES:
            raise RunError(f"{shown(path)} is a {shown(str(kind))}; {' and '.join(_CLASSES)} can be read")
        window, d_model = count(log, said, "T"), count(log, said, "d_in")
        n_features, k = count(log, said, "d_sae"), count(log, said, "k_win")
        weights = {name: value for name, value in read_torch(path).items() if name in _STATE}
        shapes = {"W_enc": (window, d_model, n_features), "W_dec": (n_features, window, d_model)}
        for name, shape in (shapes | {"b_dec": (window, d_model)}).items():
            found = weights.get(name)
            if found is not None and tuple(found.shape) != shape:
                what = f"'{name}' has shape {list(found.shape)}, the log needs {list(shape)}"
                raise RunError(f"{shown(path)}: {what}: its files belong to different SAEs")
        side_by_side = {"W_enc": (-1, n_features), "W_dec": (n_features, -1), "b_dec": (-1,)}
        weights |= {name: weights[name].reshape(shape) for name, shape in side_by_side.items() if name in weights}
        build = partial(TemporalCrosscoder, d_model, n_features, window=window, k=k, metadata=_place(log, said))
        return filled(path, build, weights)


def _log(path: Path) -> Path | None:
    beside = (path.with_suffix(".json"), path.parent.parent / LOGS / f"{path.stem}.json")
    return next((each for each in beside if each.exists()), None)


def _place(log: Path, said: dict[str, Any]) -> dict[str, Any]:
    place = {"model_name": "subject_model", "layer": "anchor_layer", "hook_name": "hook_name"}
    return place_of(log, {ours: said[theirs] for ours, theirs in place.items() if said.get(theirs) is not None})
