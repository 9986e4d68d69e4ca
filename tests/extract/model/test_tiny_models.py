"""The tiny models themselves: loadable, tokenizing, sensitive to what tests rely on them to show."""

import pytest
import torch
from tiny import KINDS, tiny_text
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_loads_and_round_trips_text(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tiny_text(3)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) > 100
    literal = tokenizer(f"a {tokenizer.bos_token} b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.bos_token_id not in literal
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([ids[:64]])).logits
    assert logits.std() > 0.3
