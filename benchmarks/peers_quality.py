"""SAELens' side of ``benchmarks/quality.py``: one SAE, trained by ``SAETrainer.fit`` on batches from standard input.

    python benchmarks/peers_quality.py '{"kind": "standard", "sae": {…}, "trainer": {…}, …}' < batches

It is started by ``quality.py`` with the Python of an environment that has sae-lens; tcsae is not needed there. Standard
input holds the initial value of b_dec, [D] float32, and then batch after batch of raw activations, [N, D] bfloat16.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

KINDS = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def read(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The next tensor of standard input; None at the end."""
    numbers = torch.Size(shape).numel()
    data = bytearray(sys.stdin.buffer.read(numbers * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).view(shape) if len(data) == numbers * dtype.itemsize else None


def batches(n_tokens: int, d_in: int) -> Iterator[Tensor]:
    while (batch := read((n_tokens, d_in), torch.bfloat16)) is not None:
        yield batch.float()


def main() -> None:
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    torch.manual_seed(order["seed"])
    new, config = KINDS[order["kind"]]
    sae = new(config(**order["sae"]))
    trainer_config = SAETrainerConfig(**order["trainer"])
    b_dec = read((sae.cfg.d_in,), torch.float32)
    assert b_dec is not None
    sae.b_dec.data.copy_(b_dec)
    stream = batches(trainer_config.train_batch_size_samples, sae.cfg.d_in)
    trainer = SAETrainer(trainer_config, sae, data_provider=stream)
    trainer.activation_scaler.scaling_factor = order["scale"]  # folded into the weights by fit
    trainer.fit()
    sae.save_inference_model(order["out"])
    print(json.dumps({"dead": int(trainer.dead_neurons.sum()), "steps": trainer.n_training_steps}))


if __name__ == "__main__":
    main()
