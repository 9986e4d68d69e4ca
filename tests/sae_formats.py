"""What SAE files of other programs say of themselves beyond four weights, and what becomes of it here: one case per
field and value. ``python tests/sae_formats.py docs/SAE_FORMATS.md`` writes the table.

Every case writes a folder as the other program does. Where the field is honoured, the case also has the formula that
the other program computes; tests compare with it, and with the program itself where that is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import published
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 6, 16, 3
Computed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One field of one format."""

    format: str
    field: str
    value: str
    """As the table shows it."""
    write: Callable[[Path], Path]
    """Writes the SAE into a folder; returns the path that is read."""
    outcome: str
    """``honoured``, ``refused`` or ``noted``."""
    meaning: str
    """What is done with it; where it is refused, what the sentence holds."""
    computed: Callable[[Tensor], Computed] | None = None
    """Codes and reconstruction by the other program's formula; None where that is not to be compared."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Of what is read: ``layer``, ``site``, ``model_name``, and metadata by name."""

    @property
    def id(self) -> str:
        """As a test is named."""
        return f"{self.format}-{self.field}-{self.value}".replace(" ", "_")


def x() -> Tensor:
    """Activations [40, D]."""
    return published.random(40, D, seed=11) * 6


def weights() -> dict[str, Tensor]:
    """Four weights of SAELens' names and layouts."""
    return published._plain(D, F)


def coded(pre: Tensor, kind: str = "relu", threshold: Tensor | float = 0.0) -> Tensor:
    """Codes of pre-activations [.., F]."""
    if kind == "topk":
        kept = torch.relu(pre).topk(K, dim=-1)
        return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    return torch.relu(pre) * (pre > threshold)


def plain(kind: str = "relu", *, subtract: bool = True, threshold: Any = 0.0, rescale: bool = False, dtype=None):
    """The formula of the four weights; ``rescale`` by the norms of the decoder's rows, as SAELens' topk may."""

    def computed(x: Tensor) -> Computed:
        w = {name: value.to(dtype).float() if dtype else value for name, value in weights().items()}
        norms = w["W_dec"].norm(dim=1) if rescale else 1.0
        pre = ((x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"]) * norms
        z = coded(pre, kind, threshold)
        return z, (z / norms) @ w["W_dec"] + w["b_dec"]

    return computed


# --- SAELens ----------------------------------------------------------------------------------------------------------

THRESHOLD = 0.4
PLACE = {"hook_name": published.HOOK, "model_name": "gpt2-small", "prepend_bos": True, "context_size": 128}


def saelens(architecture: str = "standard", *, tensors=None, metadata=None, dtype=None, **said: Any):
    """A folder of SAELens 6 or later: what is of the model and the text stands under ``metadata``."""
    base = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": PLACE | {"sae_lens_version": "6.54.12"} | (metadata or {})}  # fmt: skip
    return lambda folder: _saelens(folder, base | said, tensors, dtype)


def saelens_5(**said: Any):
    """A folder of SAELens before 6: everything at the top."""
    base = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
            "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
            "normalize_activations": "none", "finetuning_scaling_factor": False, "sae_lens_training_version": "5.0.0",
            "hook_layer": 1, "hook_head_index": None} | PLACE  # fmt: skip
    return lambda folder: _saelens(folder, base | said)


def saelens_2(**said: Any):
    """A folder of SAELens 2: the hook is a ``hook_point``, normalisation is yes or no."""
    base = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu", "hook_point": published.HOOK,
            "hook_point_layer": 1, "hook_point_head_index": None, "model_name": "gpt2-small",
            "apply_b_dec_to_input": True, "normalize_activations": False, "use_ghost_grads": True}  # fmt: skip
    return lambda folder: _saelens(folder, base | said)


def _saelens(folder: Path, config: dict[str, Any], tensors=None, dtype=None) -> Path:
    folder.mkdir(parents=True)
    stored = {name: value.to(dtype) if dtype else value for name, value in (weights() | (tensors or {})).items()}
    save_file(stored, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def gated_weights() -> dict[str, Tensor]:
    """What a gated SAE has beside the four."""
    names = ("b_gate", "b_mag", "r_mag")
    return {name: published.random(F, seed=20 + at) / 4 for at, name in enumerate(names)}


def gated(x: Tensor) -> Computed:
    """z = [x' W_enc + b_gate > 0] · relu(x' W_enc exp(r_mag) + b_mag)."""
    w = weights() | gated_weights()
    shared = (x - w["b_dec"]) @ w["W_enc"]
    z = (shared + w["b_gate"] > 0) * torch.relu(shared * w["r_mag"].exp() + w["b_mag"])
    return z, z @ w["W_dec"] + w["b_dec"]


def without_b_enc(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A gated SAE of SAELens has no ``b_enc``."""
    from safetensors.torch import load_file

    def written(folder: Path) -> Path:
        path = write(folder) / "sae_weights.safetensors"
        save_file({name: value for name, value in load_file(path).items() if name != "b_enc"}, path)
        return folder

    return written


def _saelens_cases() -> list[Case]:
    per_feature = {"threshold": published.random(F, seed=5).abs()}
    rows = [
        ("architecture", "standard", saelens(), "honoured", "relu", plain()),
        ("architecture", "topk", saelens("topk", k=K, rescale_acts_by_decoder_norm=False), "honoured",
         "its k largest", plain("topk")),
        ("rescale_acts_by_decoder_norm", "true", saelens("topk", k=K, rescale_acts_by_decoder_norm=True), "honoured",
         "folded into the weights: decoder rows of norm 1", plain("topk", rescale=True)),
        ("architecture", "jumprelu", saelens("jumprelu", tensors=per_feature), "honoured",
         "its threshold per feature", plain(threshold=per_feature["threshold"])),
        ("architecture", "batchtopk", saelens("batchtopk", k=K, rescale_acts_by_decoder_norm=False,
         tensors={"topk_threshold": torch.tensor(THRESHOLD)}), "honoured", "one threshold for all, `topk_threshold`",
         plain(threshold=THRESHOLD)),
        ("architecture", "matryoshka_batchtopk", saelens("matryoshka_batchtopk", k=K, matryoshka_widths=[4, F],
         rescale_acts_by_decoder_norm=False, tensors={"topk_threshold": torch.tensor(THRESHOLD)}), "honoured",
         "as batchtopk; `matryoshka_widths` are the nested groups", plain(threshold=THRESHOLD)),
        ("architecture", "gated", without_b_enc(saelens("gated", tensors=gated_weights())), "honoured",
         "gate and magnitude", gated),
        ("architecture", "transcoder", saelens("transcoder"), "refused", "architecture 'transcoder'", None),
        ("architecture", "skip_transcoder", saelens("skip_transcoder"), "refused", "'skip_transcoder'", None),
        ("architecture", "abstopk", saelens("abstopk", k=K), "refused", "architecture 'abstopk'", None),
        ("architecture", "matching_pursuit", saelens("matching_pursuit"), "refused", "'matching_pursuit'", None),
        ("architecture", "temporal", saelens("temporal"), "refused", "architecture 'temporal'", None),
        ("apply_b_dec_to_input", "false", saelens(apply_b_dec_to_input=False), "honoured",
         "b_dec is not subtracted from the input", plain(subtract=False)),
        ("normalize_activations", "expected_average_only_in",
         saelens(normalize_activations="expected_average_only_in"), "refused", "normalises its inputs", None),
        ("normalize_activations", "constant_norm_rescale",
         saelens(normalize_activations="constant_norm_rescale"), "refused", "normalises its inputs", None),
        ("normalize_activations", "layer_norm", saelens(normalize_activations="layer_norm"), "refused",
         "normalises its inputs", None),
        ("normalize_activations", "covariance_whitening", saelens(normalize_activations="covariance_whitening"),
         "refused", "normalises its inputs", None),
        ("reshape_activations", "hook_z", saelens(reshape_activations="hook_z"), "refused", "reshapes its inputs",
         None),
        ("dtype", "bfloat16", saelens(dtype=torch.bfloat16), "honoured",
         "the stored numbers, computed in float32", plain(dtype=torch.bfloat16)),
        ("dtype", "float64", saelens(dtype=torch.float64), "honoured", "rounded to float32", plain()),
        ("hook_name", "blocks.1.hook_mlp_out", saelens(metadata={"hook_name": "blocks.1.hook_mlp_out"}), "honoured",
         "the hook point `mlp_out`", plain(), {"site": "mlp_out"}),
        ("hook_name", "blocks.1.attn.hook_z", saelens(metadata={"hook_name": "blocks.1.attn.hook_z"}), "refused",
         "reads the attention heads", None),
        ("hook_head_index", "2", saelens(metadata={"hook_head_index": 2}), "refused", "reads one attention head", None),
        ("hook_name_out", "another hook", saelens(metadata={"hook_name_out": "blocks.1.hook_mlp_out"}), "refused",
         "is a transcoder", None),
        ("model_name", "of another model", saelens(metadata={"model_name": "pythia-70m-deduped"}), "noted",
         "it was made for pythia-70m-deduped", None),
        ("prepend_bos", "other than the text's", saelens(metadata={"prepend_bos": False}), "noted",
         "rows that begin without a special token", None),
        ("context_size", "shorter than the text's", saelens(metadata={"context_size": 4}), "noted", "rows of 4 tokens",
         None),
        ("seqpos_slice", "some positions only", saelens(metadata={"seqpos_slice": [5, None]}), "noted",
         "positions [5, None] of a row alone", None),
        ("model_from_pretrained_kwargs", "center_writing_weights", saelens(metadata={"model_from_pretrained_kwargs":
         {"center_writing_weights": True}}), "noted", "weights that were centred", None),
    ]  # fmt: skip
    older = [
        ("hook_point", "blocks.1.hook_mlp_out", saelens_2(hook_point="blocks.1.hook_mlp_out"), "honoured",
         "the hook point `mlp_out`", plain(), {"site": "mlp_out"}),
        ("hook_point_head_index", "2", saelens_2(hook_point_head_index=2), "refused", "reads one attention head", None),
        ("normalize_activations", "true", saelens_2(normalize_activations=True), "refused", "normalises its inputs",
         None),
        ("activation_fn_str, activation_fn_kwargs", "topk, k",
         saelens_5(activation_fn_str="topk", activation_fn_kwargs={"k": K}), "honoured", "its k largest",
         plain("topk")),
        ("activation_fn, activation_fn_kwargs", "topk, k",
         saelens_5(activation_fn_str=None, activation_fn="topk", activation_fn_kwargs={"k": K}), "honoured",
         "its k largest", plain("topk")),
        ("activation_fn_str", "tanh-relu", saelens_5(activation_fn_str="tanh-relu"), "refused",
         "activation 'tanh-relu'", None),
        ("hook_name", "blocks.1.hook_attn_out", saelens_5(hook_name="blocks.1.hook_attn_out"), "honoured",
         "the hook point `attn_out`", plain(), {"site": "attn_out"}),
        ("hook_head_index", "2", saelens_5(hook_head_index=2), "refused", "reads one attention head", None),
        ("finetuning_scaling_factor", "true", saelens_5(finetuning_scaling_factor=True), "refused",
         "scales its features", None),
        ("apply_b_dec_to_input", "false", saelens_5(apply_b_dec_to_input=False), "honoured",
         "b_dec is not subtracted from the input", plain(subtract=False)),
        ("hook_layer", "another than the hook's", saelens_5(hook_layer=2), "refused", "contradicts itself", None),
    ]  # fmt: skip
    return [Case("SAELens 6", *row) for row in rows] + [Case("SAELens before 6", *row) for row in older]


# --- dictionary_learning ----------------------------------------------------------------------------------------------


def dictionary(dict_class: str, state: Callable[[], dict[str, Tensor]], **said: Any) -> Callable[[Path], Path]:
    """``ae.pt`` and ``config.json``."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        torch.save(state(), folder / "ae.pt")
        trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "k": K, "layer": 1,
                   "lm_name": "openai-community/gpt2", "submodule_name": "resid_post_layer_1"}  # fmt: skip
        (folder / "config.json").write_text(json.dumps({"trainer": trainer | said, "buffer": {"ctx_len": 128}}))
        return folder

    return write


def linear(bias: str = "bias") -> dict[str, Tensor]:
    """Linear layers' names and layouts."""
    w = weights()
    w["W_dec"] = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)  # its reader normalises what is not
    return {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(), bias: w["b_dec"]}  # fmt: skip


def of_linear(kind: str = "relu", *, subtract: bool = True, threshold: float = 0.0):
    """The formula of :func:`linear`'s weights."""

    def computed(x: Tensor) -> Computed:
        w, dec = weights(), linear()["decoder.weight"].T
        z = coded((x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"], kind, threshold)
        return z, z @ dec + w["b_dec"]

    return computed


def _k(threshold: float = -1.0) -> dict[str, Tensor]:
    return {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}


def gated_dictionary() -> dict[str, Tensor]:
    """GatedAutoEncoder's names."""
    state, more = linear("decoder_bias"), gated_weights()
    del state["encoder.bias"]
    return state | {"gate_bias": more["b_gate"], "mag_bias": more["b_mag"], "r_mag": more["r_mag"]}


def gated_unit(x: Tensor) -> Computed:
    """:func:`gated` with the decoder of :func:`linear`."""
    z, _ = gated(x)
    return z, z @ linear()["decoder.weight"].T + weights()["b_dec"]


def _dictionary_cases() -> list[Case]:
    groups = {"group_sizes": torch.tensor([4, F - 4])}
    jump = {"threshold": published.random(F, seed=5).abs()}
    rows = [
        ("dict_class", "AutoEncoder", dictionary("AutoEncoder", linear), "honoured", "relu", of_linear()),
        ("dict_class", "AutoEncoderNew", dictionary("AutoEncoderNew", lambda: linear("decoder.bias")), "honoured",
         "relu, b_dec is not subtracted from the input", of_linear(subtract=False)),
        ("dict_class", "AutoEncoderTopK", dictionary("AutoEncoderTopK", lambda: linear("b_dec") | _k()), "honoured",
         "its k largest", of_linear("topk")),
        ("dict_class", "BatchTopKSAE", dictionary("BatchTopKSAE", lambda: linear("b_dec") | _k(THRESHOLD)), "honoured",
         "its threshold", of_linear(threshold=THRESHOLD)),
        ("dict_class", "MatryoshkaBatchTopKSAE", dictionary("MatryoshkaBatchTopKSAE",
         lambda: weights() | _k(THRESHOLD) | groups), "honoured",
         "its threshold; `group_sizes` are the nested groups", plain(threshold=THRESHOLD)),
        ("dict_class", "TemporalMatryoshkaBatchTopKSAE", dictionary("TemporalMatryoshkaBatchTopKSAE",
         lambda: weights() | _k(THRESHOLD) | groups), "honoured", "as MatryoshkaBatchTopKSAE (Temporal SAE)",
         plain(threshold=THRESHOLD)),
        ("dict_class", "JumpReluAutoEncoder", dictionary("JumpReluAutoEncoder", lambda: weights() | jump), "honoured",
         "its threshold per feature, b_dec is not subtracted", plain(subtract=False, threshold=jump["threshold"])),
        ("dict_class", "GatedAutoEncoder", dictionary("GatedAutoEncoder", gated_dictionary), "honoured",
         "gate and magnitude", gated_unit),
        ("dict_class", "IdentityDict", dictionary("IdentityDict", linear), "refused", "class 'IdentityDict'", None),
        ("dict_class", "CrossCoder", dictionary("CrossCoder", linear), "refused", "class 'CrossCoder'", None),
        ("submodule_name", "model.layers.1.mlp", dictionary("AutoEncoder", linear, submodule_name="model.layers.1.mlp"),
         "honoured", "that module's output, the hook point `mlp_out`", of_linear(), {"site": "mlp_out"}),
        ("submodule_name", "mlp_out_layer_1", dictionary("AutoEncoder", linear, submodule_name="mlp_out_layer_1"),
         "honoured", "the hook point `mlp_out`", of_linear(), {"site": "mlp_out"}),
        ("io", "in", dictionary("AutoEncoder", linear, submodule_name="model.layers.1", io="in"), "honoured",
         "the hook point `resid_pre`", of_linear(), {"site": "resid_pre"}),
        ("io", "in_and_out", dictionary("AutoEncoder", linear, io="in_and_out"), "refused", "is a transcoder", None),
        ("layer", "another than the module's", dictionary("AutoEncoder", linear, layer=2), "refused",
         "contradicts itself", None),
        ("lm_name", "of another model", dictionary("AutoEncoder", linear, lm_name="EleutherAI/pythia-70m-deduped"),
         "noted", "it was made for EleutherAI/pythia-70m-deduped", None),
    ]  # fmt: skip
    return [Case("dictionary_learning", *row) for row in rows]


# --- sparsify, Gemma Scope, Llama Scope, others -----------------------------------------------------------------------


def sparsify(**said: Any) -> Callable[[Path], Path]:
    """``cfg.json`` and ``sae.safetensors``."""

    def write(folder: Path) -> Path:
        path = published.sparsify(folder, D, F)
        config = json.loads((path / "cfg.json").read_text())
        (path / "cfg.json").write_text(json.dumps(config | {"num_latents": F, "normalize_decoder": True} | said))
        return path

    return write


def gemma_scope_2(**said: Any) -> Callable[[Path], Path]:
    """``params.safetensors`` and ``config.json``."""

    def write(folder: Path) -> Path:
        path = published.gemma_scope_2(folder, D, F)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | said))
        return path

    return write


def llama_scope(**said: Any) -> Callable[[Path], Path]:
    """``hyperparams.json`` and ``checkpoints/final.safetensors``."""
    return lambda folder: published.llama_scope(folder, D, F, said=said)


def of_llama_scope(*, subtract: bool = False, with_norm: bool = True):
    """Inputs of norm √D on average, a threshold on z · ‖decoder row‖."""

    def computed(x: Tensor) -> Computed:
        w, scale = {name: value.bfloat16().float() for name, value in weights().items()}, D**0.5 / 3.0
        pre = (x * scale - w["b_dec"] if subtract else x * scale) @ w["W_enc"] + w["b_enc"]
        z = torch.relu(pre) * (pre * (w["W_dec"].norm(dim=1) if with_norm else 1.0) > 0.2)
        return z, (z @ w["W_dec"] + w["b_dec"]) / scale

    return computed


def _other_cases() -> list[Case]:
    jump = plain(subtract=False, threshold=published.random(F, seed=5).abs())
    layer = {"layer": 1}
    return [
        Case("sparsify", "k", str(K), sparsify(), "honoured", "its k largest", plain("topk"), layer),
        Case("sparsify", "the folder's name", "layers.1.mlp", lambda folder: sparsify()(folder).rename(
             folder / "layers.1.mlp"), "honoured", "the hook point `mlp_out`", plain("topk"), {"site": "mlp_out"}),
        Case("sparsify", "the folder's name", "layers.1.attn.o_proj", lambda folder: sparsify()(folder).rename(
             folder / "layers.1.attn.o_proj"), "refused", "none of the hook points"),
        Case("sparsify", "activation", "groupmax", sparsify(activation="groupmax"), "refused",
             "activation 'groupmax'"),
        Case("sparsify", "transcode", "true", sparsify(transcode=True), "refused", "is a transcoder"),
        Case("sparsify", "skip_connection", "true", sparsify(skip_connection=True), "refused",
             "has a skip connection"),
        Case("sparsify", "signed", "true", sparsify(signed=True), "refused", "has signed codes"),
        Case("sparsify", "multi_topk", "true", sparsify(multi_topk=True), "honoured", "concerns its training alone",
             plain("topk"), layer),
        Case("Gemma Scope 2", "threshold", "per feature", gemma_scope_2(), "honoured",
             "jumprelu, b_dec is not subtracted", jump, layer),
        Case("Gemma Scope 2", "hf_hook_point_in", "….post_feedforward_layernorm.output",
             gemma_scope_2(hf_hook_point_in="model.layers.1.post_feedforward_layernorm.output"), "honoured",
             "the hook point `mlp_out`", jump, {"site": "mlp_out"}),
        Case("Gemma Scope 2", "hf_hook_point_in", "….self_attn.o_proj.input",
             gemma_scope_2(hf_hook_point_in="model.layers.1.self_attn.o_proj.input"), "refused",
             "reads the attention heads"),
        Case("Gemma Scope 2", "affine_connection", "true", gemma_scope_2(affine_connection=True), "refused",
             "it is a transcoder"),
        Case("Llama Scope", "norm_activation", "dataset-wise", llama_scope(), "honoured",
             "folded into the weights, by `dataset_average_activation_norm`", of_llama_scope(), layer),
        Case("Llama Scope", "norm_activation", "token-wise", llama_scope(norm_activation="token-wise"), "refused",
             "normalises inputs by 'token-wise'"),
        Case("Llama Scope", "sparsity_include_decoder_norm", "false",
             llama_scope(sparsity_include_decoder_norm=False), "honoured", "the threshold is the code's own",
             of_llama_scope(with_norm=False)),
        Case("Llama Scope", "apply_decoder_bias_to_pre_encoder", "true",
             llama_scope(apply_decoder_bias_to_pre_encoder=True), "honoured", "b_dec is subtracted from the input",
             of_llama_scope(subtract=True)),
        Case("Llama Scope", "act_fn", "topk", llama_scope(act_fn="topk"), "refused", "activation 'topk'"),
        Case("Llama Scope", "use_glu_encoder", "true", llama_scope(use_glu_encoder=True), "refused",
             "has a gated encoder"),
        Case("Llama Scope", "hook_point_out", "another hook", llama_scope(hook_point_out="blocks.1.hook_mlp_out"),
             "refused", "it is a transcoder"),
    ]  # fmt: skip


CASES = [*_saelens_cases(), *_dictionary_cases(), *_other_cases()]


def page() -> str:
    """docs/SAE_FORMATS.md."""
    lines = [
        "# What is read of SAEs from elsewhere",
        "",
        "Written by `python tests/sae_formats.py docs/SAE_FORMATS.md`; the tests make every SAE of these tables, and",
        "where the program that the format comes from is installed they compare with what it computes itself.",
        "",
        "*honoured*: the SAE computes here what it computes there. *refused*: one sentence that names the field, and",
        "nothing is measured. *noted*: it is measured, and the difference said in the terminal and in its row of the",
        "report. What only concerns an SAE's training (learning rates, auxiliary losses, …) is not read.",
    ]
    for name in dict.fromkeys(case.format for case in CASES):
        lines += ["", f"## {name}", "", "| field | value | | |", "|---|---|---|---|"]
        lines += [_row(case) for case in CASES if case.format == name]
    lines += [
        "",
        "Gemma Scope's first edition (`params.npz`) has weights alone. Temporal Feature Analysis (`conf.yaml`) and",
        "temporal crosscoders (`training_logs/NAME.json`) are compared with their formulas in",
        "`tests/train/formats/test_rivals.py`; files that disagree with their shapes are refused.",
    ]
    return "\n".join(lines) + "\n"


def _row(case: Case) -> str:
    said = case.meaning if case.outcome == "honoured" else f"“{case.meaning}”"
    fields = ", ".join(each if " " in each else f"`{each}`" for each in case.field.split(", "))
    return f"| {fields} | {case.value} | {case.outcome} | {said} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
