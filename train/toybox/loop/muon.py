"""Muon (Jordan et al. 2024) in any dtype: torch's own orthogonalises in bfloat16, which most CPUs only emulate."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Matrices [B, m, n] with singular values brought near 1 by quintic Newton-Schulz steps, in `dtype`."""
    a, b, c = coefficients
    x = matrices.to(dtype)
    upright = x.shape[1] > x.shape[2]
    x = x.mT if upright else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if upright else x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, computing in `dtype` and batching matrices of the same
    shape; its state is interchangeable with torch's."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            params: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, gradients, buffers)
            momentum, same_shape = group["momentum"], defaultdict[torch.Size, list[int]](list)
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's
            for i, param in enumerate(params):
                same_shape[param.shape].append(i)
            for shape, places in same_shape.items():
                turned = orthogonalised(
                    torch.stack([updates[i] for i in places]),
                    cast(tuple[float, float, float], group["ns_coefficients"]),
                    group["ns_steps"],
                    group["eps"],
                    self.dtype,
                )
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for i, update in zip(places, turned.float(), strict=True):
                    params[i].mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return None
