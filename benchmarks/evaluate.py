"""Our spliced evaluation against the usual procedure, which runs the whole model three times per SAE and batch.

    python benchmarks/evaluate.py  # random model of SmolLM2-135M's shape, layer 15, 8 SAEs and 1
    python benchmarks/evaluate.py --model demo --rows 8        # the demo's real model
    python benchmarks/evaluate.py --memory  # peak memory of a pass at a vocabulary of 256,000 (Linux)

Both sides get the same model, tokens and SAEs in the same process, take turns, and must agree on CE and KL. The median
of the rounds' ratios is printed, as JSON. The usual procedure, as in SAELens and SAEBench, is per SAE and batch: one
clean forward pass, one in which a hook inserts the reconstruction, and one in which it inserts zeros, with the full
logits of each, and KL from softmax and log.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from tcsae.cache.format.layout import SPECIAL, RowBlock
from tcsae.console import progress
from tcsae.evaluate.model.heldout_text import HeldOutText, survey
from tcsae.evaluate.model.splice import Head, SplicedModel
from tcsae.evaluate.one_pass import Measurement
from tcsae.evaluate.table_row import Candidate, MeasuredRow
from tcsae.sites import Location
from tcsae.train.sae.activation import Activation
from tcsae.train.sae.temporal_sae import TemporalSAE
from torch import Tensor

SHAPES = {
    "smollm2": {"layers": 30, "d_model": 576, "heads": 9, "kv": 3, "mlp": 1536, "vocabulary": 49152},
    "small": {"layers": 12, "d_model": 128, "heads": 4, "kv": 2, "mlp": 384, "vocabulary": 4096},
}


def random_model(shape: str, device: str) -> Any:
    """A Llama with random weights, wrapped as a language model of the evaluation."""
    s = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=s["vocabulary"], hidden_size=s["d_model"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"], intermediate_size=s["mlp"], bos_token_id=0, eos_token_id=0, pad_token_id=None,
        tie_word_embeddings=shape == "256k",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    return SimpleNamespace(
        model=model, decoder=model.model, blocks=model.model.layers, device=torch.device(device), dtype=torch.float32,
        identity=SimpleNamespace(architecture="LlamaForCausalLM", id=shape), d_model=s["d_model"],
        vocab_size=s["vocabulary"], n_layers=s["layers"], module_hooks={}, block_calls={},
    )  # fmt: skip


def real_model(name: str, device: str) -> Any:
    from tcsae.extract.config import ModelSource
    from tcsae.extract.model.load import load_language_model

    return load_language_model(ModelSource(id=name, device=device, dtype="float32"))


def make_saes(n: int, lm: Any, width: int, x_ND: Tensor) -> list[TemporalSAE]:
    """TopK SAEs with random tied directions, scaled to reconstruct something; only their cost matters here."""
    saes = []
    for seed in range(n):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(width, lm.d_model, generator=draw), dim=1)
        sae = TemporalSAE(lm.d_model, width, Activation("topk", k=32)).eval().requires_grad_(False)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_dec.copy_(x_ND.mean(0).cpu())
        saes.append(sae.to(lm.device))
    return saes


@torch.no_grad()
def usual(lm: Any, tokens_BT: Tensor, layer: int, saes: list[TemporalSAE]) -> list[tuple[float, float]]:
    """(CE, KL) per SAE by three full passes each.

    KL counts positions whose input is not special; CE counts those of them that have a target.
    """
    found = []
    for sae in saes:
        clean = lm.model(input_ids=tokens_BT, use_cache=False).logits
        spliced = _hooked(lm, tokens_BT, layer, lambda x, sae=sae: sae.decode(sae.encode(x)))
        zeroed = _hooked(lm, tokens_BT, layer, torch.zeros_like)
        kls = []
        for other in (spliced, zeroed):
            p, q = torch.softmax(clean, -1), torch.softmax(other, -1)
            kls.append((p * (torch.log(p) - torch.log(q))).sum(-1)[:, 1:].mean())
        ces = [
            torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), tokens_BT[:, 2:].flatten())
            for logits in (clean, spliced, zeroed)
        ]
        found.append((float(ces[1]), float(kls[0])))
    return found


def _hooked(lm: Any, tokens_BT: Tensor, layer: int, replace: Any) -> Tensor:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        new = replace(output)
        return torch.cat([output[:, :1], new[:, 1:]], dim=1) if replace is not torch.zeros_like else new

    handle = lm.blocks[layer].register_forward_hook(hook)
    try:
        return lm.model(input_ids=tokens_BT, use_cache=False).logits
    finally:
        handle.remove()


def ours(
    lm: Any, text: HeldOutText, layer: int, saes: list[TemporalSAE], found: Any, rows: int, uniform: frozenset[Location]
) -> list[tuple[float, float]]:
    """The same quantities by the pass of the evaluation; its row of zero ablation at every position costs nothing."""
    candidates = [
        Candidate(MeasuredRow(f"sae {n}", "sae", layer), sae, found[Location(layer)], {}, str(n))
        for n, sae in enumerate(saes)
    ]
    zero_all = MeasuredRow("zero_all", "reference", layer)
    candidates.append(Candidate(zero_all, None, found[Location(layer)], {}, "zero_all"))
    measurement = Measurement(SplicedModel(lm), HEADS.setdefault(id(lm), Head(lm)), text, candidates, uniform)
    with progress("measure", None) as bar:
        measurement.run(rows, bar)
    blocks = [candidate.compat.result(None) for candidate in candidates[:-1]]
    return [(block["ce_loss_with_sae"] or 0.0, block["kl_div_with_sae"] or 0.0) for block in blocks]


HEADS: dict[int, Head] = {}


def text_of(lm: Any, rows: int, context: int) -> HeldOutText:
    tokens = np.random.default_rng(0).integers(1, lm.vocab_size, (rows, context)).astype(np.int32)
    flags = np.zeros((rows, context), np.uint8)
    flags[:, 0] = SPECIAL
    return HeldOutText.gather([RowBlock(tokens, np.zeros_like(tokens), flags)], rows)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    lm = (
        random_model(options.model, options.device)
        if options.model in SHAPES
        else real_model(options.model, options.device)
    )
    layer = len(lm.blocks) // 2 if options.layer is None else options.layer
    text = text_of(lm, options.rows, options.context)
    tokens = text.tokens(slice(0, options.rows), lm.device)
    at, model = Location(layer), SplicedModel(lm)
    found = survey(model, text, [at], options.rows)
    x_BTD = model.clean(tokens, [at]).at[at]
    one = model.clean(tokens[:1], [at])
    zeroed = model.spliced(at, torch.zeros_like(one.at[at]), tokens[:1], one)
    uniform = frozenset() if zeroed.any() else frozenset({at})
    record: dict[str, Any] = {
        "model": options.model,
        "layer": layer,
        "layers": len(lm.blocks),
        "tokens": tokens.numel(),
    }
    for n in options.saes:
        saes = make_saes(n, lm, options.width, x_BTD[:, 1:].flatten(0, 1))
        rounds = []
        for _ in range(options.rounds):
            times = []
            for call in (
                lambda saes=saes: usual(lm, tokens, layer, saes),
                lambda saes=saes: ours(lm, text, layer, saes, found, options.rows, uniform),
            ):
                start = time.perf_counter()
                result = call()
                if lm.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start, result))
            rounds.append(times)
        agreement = [
            abs(a - b) / max(abs(a), 1e-9)
            for (_, theirs), (_, mine) in rounds
            for a, b in zip(np.ravel(theirs), np.ravel(mine), strict=True)
        ]
        record[f"{n} saes"] = {
            "usual seconds": [round(one[0][0], 2) for one in rounds],
            "ours seconds": [round(one[1][0], 2) for one in rounds],
            "ratio": round(statistics.median(one[0][0] / one[1][0] for one in rounds), 2),
            "largest relative difference of CE and KL": float(max(agreement)),
        }
    return record


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Memory added by one evaluation pass over 2048 tokens at Gemma-2-2b's width and a vocabulary of 256,000."""
    width, n = options.memory_width, max(options.saes)
    SHAPES["256k"] = {"layers": 2, "d_model": width, "heads": 8, "kv": 4, "mlp": 4 * width, "vocabulary": 256_000}
    lm = random_model("256k", options.device)
    text = text_of(lm, 16, 128)
    saes = make_saes(n, lm, options.width, torch.zeros(1, width))
    found = survey(SplicedModel(lm), text, [Location(0)], 16)
    _reset_peak(options.device)
    held = _memory("VmRSS", options.device)
    start = time.perf_counter()
    ours(lm, text, 0, saes, found, 16, frozenset({Location(0)}))
    return {
        "vocabulary": lm.vocab_size, "width": width, "layers": 2, "tokens": text.tokens_RT.size, "saes": n,
        "seconds": round(time.perf_counter() - start, 1), "bytes held before (model, SAEs, text)": held,
        "peak bytes above that": _memory("VmHWM", options.device) - held,
        "logits of one pass would be": text.tokens_RT.size * lm.vocab_size * 4,
    }  # fmt: skip


def _reset_peak(device: str) -> None:
    """Reset the recorded peak, since creating the weights took more memory than holding them."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _memory(what: str, device: str) -> int:
    """Memory of this process now (VmRSS) or at its peak (VmHWM), or on the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() if what == "VmHWM" else torch.cuda.memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2", help=f"{', '.join(SHAPES)} (random), or a folder, hub id or 'demo'"
    )
    parser.add_argument("--layer", type=int, help="default: the middle one")
    parser.add_argument("--saes", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--width", type=int, default=2048, help="features per SAE")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-width", type=int, default=2304)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    record = {
        "benchmark": "evaluate --memory" if options.memory else "evaluate",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    } | (memory(options) if options.memory else speed(options))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
