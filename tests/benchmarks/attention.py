"""Milliseconds and errors of causal attention by plain products and by PyTorch's fused kernel on this CPU.

    python tests/benchmarks/attention.py [--threads 2] [--repeats 5]

Both in bfloat16, in turn in one process, the least of all repeats; errors are against float64, relative.
Gradients are of all three inputs, with the output computed before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as fused

from surgery.engine.causal_attention import attention_gradients, attention_output

SHAPES = ((8, 9, 3, 128, 64), (2, 9, 3, 512, 64), (1, 9, 3, 2048, 64), (1, 32, 8, 512, 128))


def least(function: Callable[[], object], repeats: int) -> float:
    """The shortest time of `repeats` calls after one more, in milliseconds."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("blocks x heads / key heads x tokens x width: fused, plain (ms; error)")
    for batch, heads, keys, tokens, width in SHAPES:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(batch, n, tokens, width, generator=generator).bfloat16().requires_grad_(True)
            for n in (heads, keys, keys)
        )
        scale, gqa = width**-0.5, heads != keys

        def by_pytorch(*inputs: torch.Tensor, scale: float = scale, gqa: bool = gqa) -> torch.Tensor:
            return fused(*inputs, is_causal=True, scale=scale, enable_gqa=gqa)

        wide = [one.detach().double().requires_grad_(True) for one in (q, k, v)]
        right, output = by_pytorch(*wide), by_pytorch(q, k, v)
        up = torch.randn(output.shape, generator=generator).bfloat16()
        right_gradients = torch.autograd.grad(right, wide, up.double())
        with torch.no_grad():
            forward = {
                "fused": lambda q=q, k=k, v=v, by=by_pytorch: by(q, k, v),
                "plain": lambda q=q, k=k, v=v, scale=scale: attention_output(q, k, v, scale),
            }
            told = ", ".join(
                f"{name} {least(one, given.repeats):.1f} ms ({error(one(), right):.5f})"
                for name, one in forward.items()
            )
        print(f"{batch} x {heads}/{keys} x {tokens} x {width}: output {told}")
        backward = {
            "fused": lambda o=output, i=(q, k, v), up=up: torch.autograd.grad(o, i, up, retain_graph=True),
            "plain": lambda q=q, k=k, v=v, up=up, s=scale: attention_gradients(
                q.detach(), k.detach(), v.detach(), up, s
            ),
        }
        told = ", ".join(
            f"{name} {least(one, given.repeats):.1f} ms "
            f"({max(error(*pair) for pair in zip(one(), right_gradients, strict=True)):.5f})"
            for name, one in backward.items()
        )
        print(f"    gradient {told}", flush=True)


if __name__ == "__main__":
    main()
