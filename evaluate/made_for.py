"""What an SAE from elsewhere says it was made for, against what it is measured in: another model, rows with or without
a first special token, longer rows, weights that were centred. None of these stops an evaluation; each is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..extract.assets import MODELS
from ..extract.model.load import LanguageModel
from ..system.untrusted_files import shown

_ALIASES = {"gpt2-small": "gpt2"}  # TransformerLens' name of it


def made_for_notes(metadata: Mapping[str, Any], lm: LanguageModel, context: int) -> tuple[str, ...]:
    """One sentence for every difference; what the files do not say is not compared.

    Args:
        metadata: of the SAE, under SAELens' names (``MADE_FOR`` of ``train/formats/from_weights.py``).
        lm: the model it is measured in.
        context: tokens in a row of the text it is measured on.

    """
    notes = []
    said = metadata.get("model_name")
    if isinstance(said, str) and _short(said) not in _names(lm):
        notes.append(f"its files say it was made for {shown(said)}, it is measured in {lm.identity.id}")
    bos, begins = metadata.get("prepend_bos"), lm.bos_token_id is not None
    if isinstance(bos, bool) and bos != begins:
        notes.append(
            f"it was made for rows that begin {_with(bos)} a special token (prepend_bos), these rows begin "
            f"{_with(begins)} one: the activations of a row's first tokens differ from those it has seen"
        )
    longest = metadata.get("context_size")
    if type(longest) is int and 0 < longest < context:
        notes.append(
            f"it was made for rows of {longest} tokens (context_size), these have {context}: it has seen no position "
            "beyond"
        )
    positions = metadata.get("seqpos_slice")
    if isinstance(positions, list) and any(each is not None for each in positions):
        notes.append(
            f"it was made for positions {shown(positions)} of a row alone (seqpos_slice), here all of them count"
        )
    if _centred(metadata) and _removes_means(lm):
        notes.append(
            "it was made for weights that were centred (center_writing_weights), where every activation has mean 0 "
            "over the width; the model's own activations do not: its figures here are not those of its authors"
        )
    return tuple(notes)


def _with(yes: bool) -> str:
    return "with" if yes else "without"


def _short(name: str) -> str:
    last = name.rstrip("/").split("/")[-1].casefold()
    return _ALIASES.get(last, last)


def _names(lm: LanguageModel) -> set[str]:
    """What the model is called: as it was asked for, as its configuration knows it, and a demo model's own name."""
    known = [lm.identity.id, getattr(lm.model.config, "name_or_path", "")]
    if lm.identity.id in MODELS:
        known.append(MODELS[lm.identity.id].name)
    return {_short(name) for name in known if name}


def _centred(metadata: Mapping[str, Any]) -> bool:
    """TransformerLens centres the weights that write into the residual stream unless it is told not to."""
    if metadata.get("model_class_name", "HookedTransformer") != "HookedTransformer":
        return False
    arguments = metadata.get("model_from_pretrained_kwargs")
    return isinstance(arguments, dict) and arguments.get("center_writing_weights", True) is not False


def _removes_means(lm: LanguageModel) -> bool:
    """Only a model of LayerNorms can be centred: its output does not depend on the mean over the width."""
    return any(isinstance(module, nn.LayerNorm) for module in lm.decoder.modules())
