"""Checkpoints as other groups publish them, of random weights: one writer per layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

HOOK = "blocks.1.hook_resid_post"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def _plain(d: int, f: int) -> dict[str, torch.Tensor]:
    return {"W_enc": random(d, f, seed=1), "W_dec": random(f, d, seed=2), "b_enc": random(f, seed=3) / 10,
            "b_dec": random(d, seed=4) / 10}  # fmt: skip


def temporal_sae(folder: Path, d: int, f: int, **changed: torch.Tensor) -> Path:
    """``trainer_0/ae.pt`` and ``config.json``; threshold .3, groups of a quarter and the rest."""
    folder = folder / "trainer_0"
    folder.mkdir(parents=True)
    numbers = {"k": torch.tensor(3), "threshold": torch.tensor(0.3), "group_sizes": torch.tensor([f // 4, f - f // 4])}
    torch.save(_plain(d, f) | numbers | changed, folder / "ae.pt")
    trainer = {"dict_class": "TemporalMatryoshkaBatchTopKSAE", "layer": 1, "submodule_name": "resid_post_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def temporal_feature_analysis(folder: Path, d: int, f: int, **changed: torch.Tensor) -> Path:
    """``conf.yaml`` and ``latest_ckpt.pt``; two heads, topk, inputs times .25."""
    folder.mkdir(parents=True)
    state = {"D": random(f, d, seed=1), "b": random(1, d, seed=2)}
    for at, name in enumerate(("k_ctx", "q_target", "v_ctx", "c_proj")):
        state |= {
            f"attn_layers.0.{name}.weight": random(f, f, seed=at),
            f"attn_layers.0.{name}.bias": random(f, seed=9),
        }
    torch.save({"sae": state | changed, "step": 7}, folder / "latest_ckpt.pt")
    sae = {"exp_factor": f / d, "n_heads": 2, "sae_diff_type": "topk", "kval_topk": 3, "tied_weights": True,
           "n_attn_layers": 1, "bottleneck_factor": 1, "scaling_factor": 0.25}  # fmt: skip
    (folder / "conf.yaml").write_text(yaml.safe_dump({"llm": {"dimin": d}, "sae": sae}))
    return folder


def crosscoder(folder: Path, d: int, f: int, *, said: dict[str, Any] | None = None, **changed: torch.Tensor) -> Path:
    """``ckpts/txc.pt`` in half precision and ``training_logs/txc.json``; windows of 3, k = 4 per window."""
    for name in ("ckpts", "training_logs"):
        (folder / name).mkdir(parents=True)
    state = {"W_enc": random(3, d, f, seed=1), "W_dec": random(f, 3, d, seed=2), "b_enc": random(f, seed=3) / 10,
             "b_dec": random(3, d, seed=4) / 10}  # fmt: skip
    state = {name: value.half() for name, value in (state | changed).items()}
    counters = {"num_tokens_since_fired": torch.zeros(f, dtype=torch.long), "b_dec_initialized": torch.tensor(True)}
    torch.save(state | counters, folder / "ckpts" / "txc.pt")
    log = {"src_class": "TXCBareAntidead", "T": 3, "k_win": 4, "k_pos": 1, "d_in": d, "d_sae": f, "hook_name": None,
           "anchor_layer": 1, "loss": [2.0, 1.0]}  # fmt: skip
    (folder / "training_logs" / "txc.json").write_text(json.dumps(log | (said or {})))
    return folder / "ckpts" / "txc.pt"


def llama_scope(folder: Path, d: int, f: int, *, said: dict[str, Any] | None = None, **changed: torch.Tensor) -> Path:
    """``hyperparams.json`` and ``checkpoints/final.safetensors``; θ = .2, mean norm of the inputs 3."""
    folder = folder / "Llama3_1-8B-Base-L1R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    w = _plain(d, f)
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
              "decoder.bias": w["b_dec"]}  # fmt: skip
    tensors = {name: value.contiguous().bfloat16() for name, value in (linear | changed).items()}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    config = {"d_model": d, "d_sae": f, "hook_point_in": HOOK, "hook_point_out": HOOK, "act_fn": "jumprelu",
              "jump_relu_threshold": 0.2, "norm_activation": "dataset-wise", "use_decoder_bias": True,
              "dataset_average_activation_norm": {"in": 3.0, "out": 3.0}, "sparsity_include_decoder_norm": True,
              "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config | (said or {})))
    return folder


def gemma_scope_2(folder: Path, d: int, f: int, **changed: torch.Tensor) -> Path:
    """``params.safetensors`` and ``config.json``."""
    folder = folder / "resid_post" / "layer_1_width_16k_l0_small"
    folder.mkdir(parents=True)
    tensors = _plain(d, f) | {"threshold": random(f, seed=5).abs()} | changed
    save_file({name.lower(): value for name, value in tensors.items()}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"hf_hook_point_in": "model.layers.1.output"}))
    return folder


def sparsify(folder: Path, d: int, f: int, **changed: torch.Tensor) -> Path:
    """``cfg.json`` and ``sae.safetensors``."""
    folder = folder / "layers.1"
    folder.mkdir(parents=True)
    w = _plain(d, f)
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"]}
    save_file(tensors | {"b_dec": w["b_dec"]} | changed, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": d, "k": 3}))
    return folder


PUBLISHED: dict[str, Callable[..., Path]] = {
    "dictionary-learning": temporal_sae,
    "temporal-feature-analysis": temporal_feature_analysis,
    "temporal-crosscoder": crosscoder,
    "llama-scope": llama_scope,
    "gemma-scope": gemma_scope_2,
    "sparsify": sparsify,
}
