"""Our `saebench_compat` block against SAEBench's own `core` evaluator: same SAE, same model, same tokens.

    python benchmarks/agreement.py ours FOLDER  # small random Llama, random TopK SAE, random tokens
    python benchmarks/agreement.py ours FOLDER --run runs/l5-…        # a trained run, its own model, its held-out text
    python benchmarks/agreement.py ours FOLDER --model demo --layer 5 # the demo's model and text, random TopK SAE
    python benchmarks/agreement.py theirs FOLDER      # compares; in an environment with sae-bench 0.6.0 and sae-lens

`ours` runs in this project's environment and writes what `theirs` needs: the tokens, the paths of model and SAE, and
our numbers. `theirs` runs SAEBench's functions on SAELens' wrapper of the same Hugging Face model, prints one line per
metric, and ends with status 1 if one differs by more than 1e-3 (relative).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BATCH_ROWS = 4
SMALL_ROWS, SMALL_CONTEXT = 16, 64
TOLERANCE = 1e-3


@dataclass
class Case:
    """A language model as our evaluation takes it, with its folder, the text, and the path of an SAE.

    It also names the token ids that are excluded.
    """

    lm: Any
    model_folder: Path
    text: Any
    special: list[int]
    layer: int
    sae_folder: Path | None = None


def small(options: argparse.Namespace) -> Case:
    import transformers
    from tcsae.cache.format.layout import SPECIAL, RowBlock
    from tcsae.evaluate.model.heldout_text import HeldOutText

    folder = Path(options.folder) / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokens = np.random.default_rng(0).integers(2, 1000, (SMALL_ROWS, SMALL_CONTEXT)).astype(np.int32)
    tokens[:, 0] = 0
    tokens[::3, 20] = 1  # an EOS inside the row is excluded as an input, but SAEBench counts it as a target
    flags = np.where(tokens < 2, SPECIAL, 0).astype(np.uint8)
    lm = SimpleNamespace(
        model=model, decoder=model.model, blocks=model.model.layers, device=torch.device("cpu"), dtype=torch.float32,
        identity=SimpleNamespace(architecture=type(model).__name__, id="small"), d_model=64, n_layers=6,
        module_hooks={}, block_calls={},
    )  # fmt: skip
    return Case(
        lm,
        folder,
        HeldOutText.gather([RowBlock(tokens, np.zeros_like(tokens), flags)], len(tokens)),
        [0, 1],
        options.layer,
    )


def real(options: argparse.Namespace) -> Case:
    """A model and a text as for `pipeline evaluate`: those of the run's store, or the demo's text."""
    from tcsae.evaluate.config import EvaluateConfig
    from tcsae.evaluate.model.heldout_text import HeldOutText
    from tcsae.evaluate.subjects import Group, gather_subjects
    from tcsae.extract.assets import demo_model
    from tcsae.extract.config import ModelSource, TextSource
    from tcsae.extract.model.load import load_language_model
    from tcsae.extract.text.open import open_documents
    from tcsae.extract.text.rows import row_blocks

    layer, sae_folder = options.layer, None
    if options.run:
        asked = EvaluateConfig(runs=(options.run,), model=options.model, device="cpu", dtype="float32")
        (group,), _ = gather_subjects(asked)
        layer, sae_folder = group.subjects[0].at.layer, Path(options.run).resolve()
    else:
        source = ModelSource(id=options.model, device="cpu", dtype="float32")
        group = Group(source, TextSource(dataset="demo"), held_out=False, model_fingerprint=None)
    lm = load_language_model(group.model)
    documents = open_documents(group.text)
    blocks = row_blocks(group.text, lm, held_out=group.held_out, documents=documents, rows_per_block=BATCH_ROWS)
    text = HeldOutText.gather((block for block, _ in blocks), options.rows)
    folder = demo_model() if group.model.id == "demo" else Path(group.model.id).resolve()
    return Case(lm, folder, text, list(lm.special_token_ids), layer, sae_folder)


def random_sae(d_model: int, mean_D: torch.Tensor, folder: Path) -> Path:
    from tcsae.train.sae.activation import Activation
    from tcsae.train.sae.temporal_sae import TemporalSAE

    draw = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(4 * d_model, d_model, generator=draw), dim=1)
    sae = TemporalSAE(d_model, 4 * d_model, Activation("topk", k=16))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_dec.copy_(mean_D)
    sae.save(folder)
    return folder.resolve()


def ours(options: argparse.Namespace) -> None:
    from tcsae.console import progress
    from tcsae.evaluate.model.heldout_text import survey
    from tcsae.evaluate.model.splice import Head, SplicedModel
    from tcsae.evaluate.one_pass import Measurement
    from tcsae.evaluate.table_row import Candidate, MeasuredRow
    from tcsae.sites import Location
    from tcsae.train.formats.locate import read_sae

    folder = Path(options.folder)
    case = real(options) if options.run or options.model else small(options)
    spliced, at = SplicedModel(case.lm), Location(case.layer)
    found = survey(spliced, case.text, [at], BATCH_ROWS)[at]
    sae_folder = case.sae_folder or random_sae(case.lm.d_model, found.mean_D, folder / "sae")
    measured = [
        Candidate(MeasuredRow("sae", "sae", case.layer), read_sae(sae_folder)[1], found, {}, ""),
        Candidate(MeasuredRow("zero_all", "reference", case.layer), None, found, {}, ""),
    ]
    with progress("measure", None) as bar:
        Measurement(spliced, Head(case.lm), case.text, list(measured)).run(BATCH_ROWS, bar)
    np.save(folder / "tokens.npy", case.text.tokens_RT)
    block = measured[0].compat.result(measured[1].compat)
    about = {
        "model": str(case.model_folder.resolve()),
        "sae": str(sae_folder),
        "layer": case.layer,
        "special": case.special,
    }
    (folder / "ours.json").write_text(json.dumps(about | {"block": block}, indent=1))
    print(f"wrote {folder}: {len(case.text)} rows of {case.text.context}; now run `theirs` where SAEBench is installed")


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
    rows = torch.from_numpy(np.load(folder / "tokens.npy")).long().split(BATCH_ROWS)

    def store() -> Any:
        batches = iter(rows)
        return SimpleNamespace(get_batch_tokens=lambda _rows: next(batches))

    common: dict[str, Any] = {"n_batches": len(rows), "eval_batch_size_prompts": BATCH_ROWS}
    common["ignore_tokens"] = set(about["special"])
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
    parser.add_argument("--run", help="folder of a trained run: its model, layer and held-out text are used")
    parser.add_argument(
        "--model", help="'demo' or the folder of a Llama-like model; default: the run's, or a small random one"
    )
    parser.add_argument("--layer", type=int, default=3, help="where no run says it")
    parser.add_argument("--rows", type=int, default=32, help="rows of real text")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    return theirs(options) if options.side == "theirs" else ours(options) or 0


if __name__ == "__main__":
    sys.exit(main())
