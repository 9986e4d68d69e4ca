"""Tiny random models of every causal language model family that transformers has and that a small configuration makes.

python tests/families.py docs/FAMILIES.md     runs all of them through the hook points and writes the matrix
"""

from __future__ import annotations

import os
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some families would look for faster kernels there

import torch
import transformers
from tcsae.errors import ModelError
from tcsae.evaluate.model.splice import SplicedModel
from tcsae.extract.model.blocks import cut_above, verified_blocks
from tcsae.extract.model.hooks import capture
from tcsae.extract.model.load import LanguageModel
from tcsae.sites import HOOK_POINTS, Location
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, WIDTH, VOCABULARY = 3, 32, 96
TOO_LARGE = 6_000_000  # parameters: what a small configuration did not make small
# What configurations call their sizes; each takes those that it has.
_NAMES: dict[int, str] = {
    WIDTH: "hidden_size n_embd d_model embed_dim word_embed_proj_dim emb_dim embedding_size dim_model lru_width",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads",
    64: "n_inner intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dim_ff ffn_hidden_size dff "
    "max_position_embeddings n_positions n_ctx",
}
_SIZES: dict[str, Any] = {
    **{name: size for size, names in _NAMES.items() for name in names.split()}, "vocab_size": VOCABULARY,
    "num_key_value_heads": 2, "head_dim": 8, "dim_head": 8, "rotary_dim": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16, "attention_window_size": 16,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    # state spaces and linear attention
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
    "state_size": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip
# One family of every build: fused and separate norms, parallel branches, in-place sums, multipliers, experts, lists.
FEW = (
    "bloom", "cohere", "falcon", "gemma", "glm4", "gpt_bigcode", "gpt_neo", "gptj", "granite", "jamba", "mamba",
    "mixtral", "mpt", "nanochat", "olmo2", "openai-gpt", "opt", "phi", "phi3", "qwen3", "recurrent_gemma", "stablelm",
    "xglm", "xlm",
)  # fmt: skip


class UnbuiltError(Exception):
    """The small configuration makes no small model of a family: nothing about hook points."""


def build(family: str) -> Any:
    """A random model of a family, in float32 and evaluation mode."""
    try:
        config = _small(CONFIG_MAPPING[family])
        with torch.device("meta"):
            large = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > TOO_LARGE
        if large:
            raise UnbuiltError(f"{family} stays large")
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
        model(input_ids=tokens(), use_cache=False)
    except Exception as failure:
        raise UnbuiltError(f"{type(failure).__name__}: {failure}") from failure
    return model


def _small(kind: Any) -> Any:
    """A configuration of that class with small sizes: given when it is made, or set afterwards where that fails."""
    plain = kind()
    sizes = {name: size for name, size in _SIZES.items() if getattr(plain, name, None) is not None}
    try:
        config = kind(**sizes)
    except Exception:
        config = plain
        for name, size in sizes.items():
            with suppress(Exception):
                setattr(config, name, size)
    inner = config.get_text_config()
    for name, size in _SIZES.items() if inner is not config else ():
        if getattr(inner, name, None) is not None:
            setattr(inner, name, size)
    return config


def tokens() -> torch.Tensor:
    """Two rows [B, T] without special tokens."""
    return torch.randint(5, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))


def loaded(model: Any, family: str) -> LanguageModel:
    """The model as the program loads it from disk.

    Raises:
        ModelError: its blocks cannot be told.

    """
    inner = model.config.get_text_config()
    found = verified_blocks(model, inner.num_hidden_layers, inner.hidden_size)
    identity: Any = SimpleNamespace(id=family, architecture=type(model).__name__)
    return LanguageModel(
        model=model, decoder=found.decoder, blocks=found.blocks, tokenizer=None, identity=identity,
        device=torch.device("cpu"), dtype=torch.float32, d_model=inner.hidden_size, n_layers=inner.num_hidden_layers,
        vocab_size=VOCABULARY, bos_token_id=None, special_token_ids=(),
    )  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What one family can do."""

    family: str
    architecture: str
    sites: dict[str, list[int]]
    """Hook point → the layers that have it."""
    refusals: dict[str, str]
    """Hook point → why the first layer that lacks it does."""
    whole: list[str]
    """What runs the whole model instead of the upper blocks alone."""


def check(family: str) -> Checked:
    """Build a family and hold everything that it stores and splices to what the model itself computes.

    Raises:
        UnbuiltError: see :func:`build`.
        ModelError: its blocks cannot be told.
        AssertionError: something is stored or spliced wrongly.

    """
    model, given = build(family), tokens()
    lm = loaded(model, family)
    sites: dict[str, list[int]] = {site: [] for site in HOOK_POINTS}
    refusals: dict[str, str] = {}
    at_all: list[Location] = []
    for layer in range(lm.n_layers):
        for site in sites:
            try:
                capture(lm, given, [Location(layer, site)])
            except ModelError as refused:
                refusals.setdefault(site, str(refused).split(": choose")[0])
            else:
                sites[site].append(layer)
                at_all.append(Location(layer, site))
    spliced = SplicedModel(lm)
    whole = spliced.verify(given, at_all)
    clean = spliced.clean(given, at_all)
    _hold_to_hidden_states(lm, clean.at, given)
    for at in at_all:
        x_BTD = clean.at[at]
        assert torch.equal(capture(lm, given, [at])[at], x_BTD), at
        changed = x_BTD.flip(0) * 1.3 + 0.1
        by_prefix, by_hook = spliced.spliced(at, changed, given, clean), spliced.spliced_by_hook(at, changed, given)
        assert torch.allclose(by_prefix, by_hook, rtol=1e-5, atol=1e-6), at
        assert not torch.equal(by_hook, clean.final_BTD), f"{at}: the splice changed nothing"
    _hold_to_sums(clean.at, lm.n_layers)
    _hold_to_truncation(lm, clean.at[Location(1)], given)
    return Checked(family, lm.identity.architecture, sites, refusals, whole)


def _hold_to_hidden_states(lm: LanguageModel, caught: dict[Location, torch.Tensor], given: torch.Tensor) -> None:
    states = lm.decoder(input_ids=given, use_cache=False, output_hidden_states=True).hidden_states
    if not states or len(states) != lm.n_layers + 1:
        return
    # As a rule the embedding's output comes first; Mamba's family begins with what the first block puts out.
    first = 1 if torch.equal(caught[Location(0)], states[1]) else 0
    for layer in range(lm.n_layers - 1):
        assert torch.equal(caught[Location(layer)], states[first + layer]), layer


def _hold_to_sums(caught: dict[Location, torch.Tensor], n_layers: int) -> None:
    """What is between blocks is one tensor; what is added to the stream is the stream's change (norms on it apart)."""
    for layer in range(n_layers):
        stream = {site: caught.get(Location(layer, site)) for site in HOOK_POINTS}
        if layer:
            assert torch.equal(caught[Location(layer, "resid_pre")], caught[Location(layer - 1)]), layer
        pre, mid, post = (stream[f"resid_{side}"] for side in ("pre", "mid", "post"))
        attention, mlp = stream["attn_out"], stream["mlp_out"]
        if attention is None or mlp is None or torch.allclose(post.mean(-1), torch.zeros(()), atol=1e-6):
            continue  # a norm's output: GPT-1
        assert torch.allclose(pre + attention + mlp, post, rtol=1e-4, atol=1e-5), layer
        if mid is not None:
            assert torch.allclose(pre + attention, mid, rtol=1e-4, atol=1e-5), layer


def _hold_to_truncation(lm: LanguageModel, x_BTD: torch.Tensor, given: torch.Tensor) -> None:
    found = verified_blocks(lm.model, lm.n_layers, lm.d_model)
    cut_above(found, 1)
    lm.decoder, lm.blocks, lm.module_hooks = found.decoder, found.blocks, {}
    assert torch.equal(capture(lm, given, [Location(1)])[Location(1)], x_BTD)


def matrix() -> str:
    """docs/FAMILIES.md: what every family can do."""
    rows, refused, unbuilt = [], [], []
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        print(family, file=sys.stderr, flush=True)
        try:
            found = check(family)
        except UnbuiltError:
            unbuilt.append(family)
        except ModelError as failure:
            refused.append(f"| {family} | {failure} |")
        else:
            rows.append(_row(found))
    head = ["family", "class", *HOOK_POINTS, "spliced"]
    lines = [
        "# Model families",
        "",
        f"Written by `python tests/families.py docs/FAMILIES.md` with transformers {transformers.__version__}: "
        f"every family of causal language models of which a small random model can be made, {len(rows)} of them "
        "below, with three blocks in float32. What is stored is compared with the model's own hidden states and "
        "with what its blocks add, every splice on a shared prefix with a full run with a hook, every truncated "
        "model with the whole one.",
        "",
        "*some* means that only some blocks have it (attention, in models that have it in some blocks). A dash: "
        "asking for it ends in a sentence that says why. *shared prefix*: only the blocks above the splice run "
        "again; *whole model*: the family does not allow that, and the whole model runs with a hook.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *rows,
        "",
        "Refused as a whole, with this sentence:",
        "",
        "| family | sentence |",
        "|---|---|",
        *refused,
        "",
        f"Not tried, since no small random model could be made from the configuration's defaults: "
        f"{', '.join(unbuilt)}.",
        "",
    ]
    # Prose within the width of the other documents; rows of tables are lines by nature.
    return "\n".join(
        line if line.startswith("|") else textwrap.fill(line, 120, break_on_hyphens=False) for line in lines
    )


def _row(found: Checked) -> str:
    cells = [{LAYERS: "yes", 0: "–"}.get(len(layers), "some") for layers in found.sites.values()]
    how = "shared prefix" if not found.whole else "whole model"
    return f"| {' | '.join([found.family, found.architecture, *cells, how])} |"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    text = matrix()
    Path(sys.argv[1]).write_text(text, encoding="utf-8")
    print(text)
