"""The contenders of ``benchmarks/train.py``: the trainers of SAELens and dictionary_learning, and a dense step.

Neither peer is needed to import this module. They get our weights, our λ1 and our batches, and the same constraints as
our trainer: Adam with torch's fused kernel, gradients clipped at norm 1, decoder rows of unit norm. What a trainer
lacks of these is added through hooks of its optimiser, at the same cost as in our own step.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# It trains on a batch of windows [N, W, D] and returns a function that computes L0, which is not part of the step.
Step = Callable[[Tensor], Callable[[], float]]


def saelens(sae: Any, l1: float, lr: float, n_tokens: int, compute_dtype: torch.dtype) -> Step:
    """``SAETrainer.step`` on a standard SAE."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    device = str(sae.W_enc.device)
    config = StandardTrainingSAEConfig(
        d_in=sae.d_model,
        d_sae=sae.n_features,
        dtype="float32",
        device=device,
        apply_b_dec_to_input=True,
        l1_coefficient=l1,
    )
    theirs = StandardTrainingSAE(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**12,
            train_batch_size_samples=n_tokens,
            lr=lr,
            lr_end=lr,
            device=device,
            autocast=compute_dtype == torch.bfloat16,
        ),
        theirs,
        data_provider=iter(()),
    )
    _copy({name: getattr(theirs, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, sae, transposed=())
    _fuse(trainer.optimizer)
    _constrain(trainer.optimizer, theirs.W_dec)

    def step(x_NWD: Tensor) -> Callable[[], float]:
        output = trainer.step(x_NWD.flatten(0, 1))
        trainer.n_training_steps += 1
        return lambda: float(output.feature_acts.detach().count_nonzero()) / n_tokens

    return step


def dictionary_learning(sae: Any, l1: float, lr: float, n_tokens: int, compute_dtype: torch.dtype) -> Step:
    """``StandardTrainer.update``, which keeps unit rows itself, but does not clip gradients or use mixed precision."""
    from dictionary_learning.trainers.standard import StandardTrainer

    trainer = StandardTrainer(
        steps=10**9,
        activation_dim=sae.d_model,
        dict_size=sae.n_features,
        layer=0,
        lm_name="none",
        lr=lr,
        l1_penalty=l1,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device=str(sae.W_enc.device),
    )
    theirs = trainer.ae
    targets = {
        "W_enc": theirs.encoder.weight,
        "b_enc": theirs.encoder.bias,
        "W_dec": theirs.decoder.weight,
        "b_dec": theirs.bias,
    }
    _copy(targets, sae, transposed=("W_enc", "W_dec"))
    _fuse(trainer.optimizer)
    trainer.optimizer.register_step_pre_hook(lambda *_: _clip(theirs.parameters()))
    codes: list[Tensor] = []
    theirs.encoder.register_forward_hook(lambda _module, _inputs, pre: codes.append(pre.detach()))
    at = iter(range(10**9))

    def step(x_NWD: Tensor) -> Callable[[], float]:
        codes.clear()
        with torch.autocast(x_NWD.device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
            trainer.update(next(at), x_NWD.flatten(0, 1))
        return lambda: float((codes[0] > 0).count_nonzero()) / n_tokens

    return step


def compiled(sae: Any, l1: float, lr: float, n_tokens: int, compute_dtype: torch.dtype) -> Step:
    """The plain dense step through autograd with its loss through torch.compile, the usual first choice on a GPU."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    weights = {name: getattr(sae, name).detach().clone().contiguous().requires_grad_() for name in names}
    optimiser = torch.optim.Adam(weights.values(), lr=lr, fused=True)
    optimiser.register_step_pre_hook(lambda *_: _clip(weights.values()))
    _constrain(optimiser, weights["W_dec"])
    loss, l1_weight = _compiled_loss(), torch.tensor(l1, device=sae.W_enc.device)

    def step(x_NWD: Tensor) -> Callable[[], float]:
        optimiser.zero_grad(set_to_none=True)
        total, fired = loss(x_NWD.flatten(0, 1), l1_weight, compute_dtype == torch.bfloat16, **weights)
        total.backward()
        optimiser.step()
        return lambda: float(fired) / n_tokens

    return step


@cache
def _compiled_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    """The compiled loss; it is compiled once for all turns."""

    def loss(
        x_ND: Tensor, l1: Tensor, half: bool, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_ND.device.type, dtype=torch.bfloat16, enabled=half):
            z = torch.relu((x_ND - b_dec) @ W_enc + b_enc)
            reconstruction = z @ W_dec + b_dec
        error = (x_ND - reconstruction.float()).square().sum(-1).mean()
        return error + l1 * z.float().sum(-1).mean(), (z > 0).sum()

    return torch.compile(loss)


PEERS = {"sae-lens": saelens, "dictionary-learning": dictionary_learning}


def installed() -> dict[str, str]:
    """The installed peers and their versions."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _copy(targets: dict[str, Tensor], sae: Any, transposed: tuple[str, ...]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            weight = getattr(sae, name)
            target.copy_(weight.t() if name in transposed else weight)


def _fuse(optimiser: torch.optim.Optimizer) -> None:
    for group in optimiser.param_groups:
        group["fused"], group["foreach"] = True, False


def _clip(parameters: Any) -> None:
    torch.nn.utils.clip_grad_norm_(list(parameters), 1.0)


def _constrain(optimiser: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """Normalise decoder rows as our own trainer does."""

    def before(*_: Any) -> None:
        if W_dec.grad is not None:
            W_dec.grad.sub_(torch.linalg.vecdot(W_dec.grad, W_dec.detach()).unsqueeze(1) * W_dec.detach())

    def after(*_: Any) -> None:
        W_dec.detach().div_(W_dec.detach().norm(dim=-1, keepdim=True))

    optimiser.register_step_pre_hook(before)
    optimiser.register_step_post_hook(after)
