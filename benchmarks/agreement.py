"""Our `saebench_compat` block against SAEBench's own `core` evaluator: same SAE, same model, same tokens.

    python benchmarks/agreement.py ours FOLDER      # in this project's environment: writes what the other needs
    python benchmarks/agreement.py theirs FOLDER    # where sae-bench 0.6.0 and sae-lens are installed: compares

`ours` takes `--model` (a folder of a Llama-like model; default: a small random one), `--sae` (a SAELens folder; default: random
TopK) and `--layer`. `theirs` runs SAEBench's functions on SAELens' wrapper of the same Hugging Face model, prints one line per
metric, and ends with status 1 when one differs by more than 1e-3 relative.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BATCHES, ROWS, CONTEXT = 4, 4, 64
TOLERANCE = 1e-3


def ours(options: argparse.Namespace) -> None:
    import transformers
    from tcsae.cache.layout import SPECIAL, RowBlock
    from tcsae.console import progress
    from tcsae.evaluate.foreign import read_saelens
    from tcsae.evaluate.heldout import HeldOutText, survey
    from tcsae.evaluate.measure import Measurement
    from tcsae.evaluate.row import Candidate, MeasuredRow
    from tcsae.evaluate.splice import Head, SplicedModel
    from tcsae.train.activation import Activation
    from tcsae.train.sae import TemporalSAE

    folder = Path(options.folder)
    model_folder = Path(options.model) if options.model else folder / "model"
    if not options.model:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=1000, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=128, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(model_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval().requires_grad_(False)
    d_model, vocabulary = model.config.hidden_size, model.config.vocab_size
    tokens = np.random.default_rng(0).integers(2, vocabulary, (BATCHES * ROWS, CONTEXT)).astype(np.int32)
    tokens[:, 0] = 0
    tokens[::3, 20] = 1  # an EOS inside the row: not an input that counts, but a target that SAEBench counts
    flags = np.where(tokens < 2, SPECIAL, 0).astype(np.uint8)
    text = HeldOutText.gather([RowBlock(tokens, np.zeros_like(tokens), flags)], len(tokens))
    lm = SimpleNamespace(
        model=model, decoder=model.model, blocks=model.model.layers, device=torch.device("cpu"), dtype=torch.float32,
        identity=SimpleNamespace(architecture=type(model).__name__), d_model=d_model,
    )  # fmt: skip
    spliced = SplicedModel(lm)
    found = survey(spliced, text, [options.layer], ROWS)[options.layer]
    sae_folder = Path(options.sae) if options.sae else folder / "sae"
    if not options.sae:
        draw = torch.Generator().manual_seed(1)
        rows = torch.nn.functional.normalize(torch.randn(4 * d_model, d_model, generator=draw), dim=1)
        sae = TemporalSAE(d_model, 4 * d_model, Activation("topk", k=16))
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T)
            sae.b_dec.copy_(found.mean_D)
        sae.save(sae_folder)
    measured = [
        Candidate(MeasuredRow("sae", "sae", options.layer), read_saelens(sae_folder), found, {}, ""),
        Candidate(MeasuredRow("zero_all", "reference", options.layer), None, found, {}, ""),
    ]
    with progress("measure", None) as bar:
        Measurement(spliced, Head(lm), text, list(measured)).run(ROWS, bar)
    np.save(folder / "tokens.npy", tokens)
    block = measured[0].compat.result(measured[1].compat)
    about = {"model": str(model_folder), "sae": str(sae_folder), "layer": options.layer, "block": block}
    (folder / "ours.json").write_text(json.dumps(about, indent=1))
    print(f"wrote {folder}; now run `theirs` where SAEBench is installed")


def theirs(options: argparse.Namespace) -> int:
    import sae_bench.evals.core.main as core
    import transformers
    from sae_lens import SAE
    from sae_lens.load_model import HookedProxyLM

    folder = Path(options.folder)
    about = json.loads((folder / "ours.json").read_text())
    hf = transformers.AutoModelForCausalLM.from_pretrained(about["model"], dtype=torch.float32).eval()
    hook = f"model.layers.{about['layer']}"
    model = HookedProxyLM(hf, tokenizer=SimpleNamespace(), hook_names=[hook])
    loaded: Any = SAE.load_from_disk(about["sae"])
    sae = SimpleNamespace(
        encode=loaded.encode, decode=loaded.decode, device=torch.device("cpu"), dtype=torch.float32,
        cfg=SimpleNamespace(hook_name=hook, hook_layer=about["layer"], hook_head_index=None, d_sae=loaded.cfg.d_sae),
    )  # fmt: skip
    rows = torch.from_numpy(np.load(folder / "tokens.npy")).long().split(ROWS)

    def store() -> Any:
        batches = iter(rows)
        return SimpleNamespace(get_batch_tokens=lambda _rows: next(batches))

    common: dict[str, Any] = {"n_batches": len(rows), "eval_batch_size_prompts": ROWS, "ignore_tokens": {0, 1}}
    with torch.no_grad():
        found = core.get_downstream_reconstruction_metrics(
            sae,
            model,
            store(),
            compute_kl=True,
            compute_ce_loss=True,
            exclude_special_tokens_from_reconstruction=True,
            **common,
        )
        more, _ = core.get_sparsity_and_variance_metrics(
            sae, model, store(), compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
            compute_featurewise_density_statistics=True, model_kwargs={}, **common,
        )  # fmt: skip
    found |= more
    worst = 0.0
    print(f"{'metric':32}{'SAEBench':>16}{'ours':>16}{'relative':>12}")
    for name in sorted(set(found) | set(about["block"])):
        a, b = found.get(name), about["block"].get(name)
        difference = abs(a - b) / max(abs(a), 1e-12) if a is not None and b is not None else float("nan")
        worst = max(worst, difference) if difference == difference else float("inf")
        print(f"{name:32}{a!s:>16.14}{b!s:>16.14}{difference:>12.1e}")
    print(f"largest relative difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "theirs"])
    parser.add_argument("folder")
    parser.add_argument("--model")
    parser.add_argument("--sae")
    parser.add_argument("--layer", type=int, default=3)
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    return theirs(options) if options.side == "theirs" else ours(options) or 0


if __name__ == "__main__":
    sys.exit(main())
