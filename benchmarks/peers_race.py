"""SAELens' side of ``benchmarks/race.py``: one stage of the job as one process, told what to do in JSON.

    python benchmarks/peers_race.py '{"stage": "cache", …}'

Runs in an environment of its own that has sae-lens; nothing of tcsae is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

HOOKED = "AutoModelForCausalLM"


def rows_of(order: dict[str, Any]) -> Dataset:
    """As a dataset: of a path the library asks the hub for a tokenizer's settings."""
    return Dataset.from_parquet(f"{order['rows']}/rows.parquet")  # pyright: ignore[reportReturnType]


def cache(order: dict[str, Any]) -> None:
    """Write the activations of the rows in the order they have."""
    config = CacheActivationsRunnerConfig(
        dataset_path=order["rows"],
        model_name=order["model"],
        model_class_name=HOOKED,
        model_batch_size=order["batch_rows"],
        hook_name=order["hook"],
        d_in=order["d_in"],
        training_tokens=order["tokens"],
        context_size=order["context"],
        new_cached_activations_path=order["out"],
        shuffle=False,
        device="cpu",
        prepend_bos=False,
        buffer_size_gb=order["buffer_gb"],
    )
    CacheActivationsRunner(config, override_dataset=rows_of(order)).run()


def train(order: dict[str, Any]) -> None:
    """Train one TopK SAE from the cache; goes on from the newest checkpoint where there is one."""
    checkpoints = sorted(Path(order["checkpoints"]).glob("**/trainer_state.pt"), key=lambda path: path.stat().st_mtime)
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=order["d_in"], d_sae=order["width"], k=order["k"]),
        model_name=order["model"],
        model_class_name=HOOKED,
        hook_name=order["hook"],
        dataset_path=order["rows"],
        context_size=order["context"],
        use_cached_activations=True,
        cached_activations_path=order["cache"],
        training_tokens=order["steps"] * order["batch_size"],
        train_batch_size_tokens=order["batch_size"],
        store_batch_size_prompts=order["batch_rows"],
        n_batches_in_buffer=64,  # rows, whatever its name says: 8192 tokens, and a batch of training must fit in
        lr=order["lr"],
        lr_warm_up_steps=order["warmup"],
        device="cpu",
        seed=order["seed"],
        prepend_bos=False,
        n_checkpoints=order["n_checkpoints"],
        checkpoint_path=order["checkpoints"],
        output_path=order["out"],
        logger=LoggingConfig(log_to_wandb=False),
        resume_from_checkpoint=str(checkpoints[-1].parent) if checkpoints else None,
    )
    LanguageModelSAETrainingRunner(config, override_dataset=rows_of(order)).run()


def evaluate(order: dict[str, Any]) -> None:
    """Everything that SAELens measures of every SAE, the model loaded once."""
    model = load_model(HOOKED, order["model"], "cpu", hook_names=[order["hook"]])
    rows = Dataset.from_parquet(order["held_out"])
    batches = order["rows_in_all"] // order["batch_rows"]
    chosen = get_eval_everything_config(order["batch_rows"], batches, batches)
    for folder in order["saes"]:
        sae = SAE.load_from_disk(folder, device="cpu")
        store = ActivationsStore.from_sae(
            model, sae, rows, context_size=order["context"], store_batch_size_prompts=order["batch_rows"]
        )
        found, _ = run_evals(sae, store, model, ActivationScaler(), chosen)
        print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(2)
    order = json.loads(sys.argv[1])
    {"cache": cache, "train": train, "evaluate": evaluate}[order["stage"]](order)
