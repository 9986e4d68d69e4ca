"""Every family stores what it computes and is spliced as it runs, or says in a sentence that it cannot."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import transformers
from tcsae.errors import ModelError
from tcsae.extract.model.blocks import verified_blocks

PAGE = Path(__file__).parents[3] / "docs" / "FAMILIES.md"
# What these blocks do not have, and the words that say so.
REFUSED = {
    "cohere": {"resid_mid": "read the same input"},
    "falcon": {"resid_mid": "read the same input"},
    "gptj": {"resid_mid": "read the same input"},
    "phi": {"resid_mid": "read the same input"},
    "jamba": {"attn_out": "something else than attention"},
    "recurrent_gemma": {"attn_out": "something else than attention"},
    "mamba": dict.fromkeys(("resid_mid", "mlp_out", "attn_out"), "adds no two tensors"),
    "xlm": dict.fromkeys(("resid_mid", "mlp_out", "attn_out"), "adds no two tensors"),
}


@pytest.mark.parametrize("family", families.FEW)
def test_a_family_is_stored_and_spliced_as_it_runs(family):
    try:
        found = families.check(family)
    except families.UnbuiltError as reason:
        pytest.skip(f"this transformers makes no small {family}: {reason}")
    assert found.refusals.keys() == REFUSED.get(family, {}).keys()
    for site, words in REFUSED.get(family, {}).items():
        assert words in found.refusals[site]
    assert not found.whole


def test_a_list_that_is_no_list_of_blocks_is_not_taken_for_one():
    """XLM keeps attentions, norms and MLPs in four lists; what ends a block is its second norm."""
    model = families.build("xlm")
    found = verified_blocks(model, families.LAYERS, families.WIDTH)
    assert found.name == "layer_norm2"
    del found.decoder.layer_norm2
    found.decoder.__dict__["layer_norm2"] = list(found.decoder.layer_norm1)  # each now runs twice in a pass
    with pytest.raises(ModelError, match=r"\(attentions, layer_norm1, ffns\), but none whose outputs are its hidden"):
        verified_blocks(model, families.LAYERS, families.WIDTH)


@pytest.mark.slow
def test_the_matrix_is_what_the_families_do():
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" not in text:
        pytest.skip("docs/FAMILIES.md was written with another transformers")
    assert families.matrix() == text
    assert text.count("shared prefix |") >= 60
