"""The lower limit of a training step's time, and where its time goes; for ``benchmarks/train.py``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from peers_train import Step
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_NAMED = 12


def floor(n_tokens: int, d_model: int, width: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """The shortest possible time of a dense step: its five products and Adam's memory traffic at their best speed."""
    rate = _best(lambda a: a @ a, torch.randn(4096, 4096, device=device, dtype=dtype))
    copied = _best(lambda a: a.add_(1), torch.randn(2**26, device=device))
    flops, adam_bytes = 5 * 2 * n_tokens * d_model * width, 2 * d_model * width * 4 * 7
    product, traffic = flops / (2 * 4096**3 / rate), adam_bytes / (2 * 4 * 2**26 / copied)
    parts = {"products_ms": 1e3 * product, "adam_ms": 1e3 * traffic}
    return {"matmul_tflops": 2e-12 * 4096**3 / rate, **parts, "tokens_per_second": n_tokens / (product + traffic)}


def _best(function: Callable[[Tensor], object], tensor: Tensor) -> float:
    seconds = []
    for _ in range(8):
        begun = time.perf_counter()
        function(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def most_of_the_time(step: Step, batches: list[Tensor], n_steps: int = 10) -> dict[str, float]:
    """The kernels (on a CPU: operations) that take the most time in a few steps, with their shares of it."""
    on_gpu = batches[0].is_cuda
    step(batches[0])
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for n in range(n_steps):
            step(batches[n % len(batches)])
        if on_gpu:
            torch.cuda.synchronize()
    times = {
        each.key: each.self_device_time_total if on_gpu else each.self_cpu_time_total for each in found.key_averages()
    }
    longest = sorted(times, key=lambda name: times[name], reverse=True)[:_NAMED]
    return {name[:80]: round(times[name] / max(1e-9, sum(times.values())), 3) for name in longest}
