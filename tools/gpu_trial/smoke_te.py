"""Whether Transformer Engine computes on this machine: a line a piece. Exit code 1 when one fails.

python3 tools/gpu_trial/smoke_te.py      in the project's root, with PYTHONPATH=.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu_trial.pieces import DEVICE, Gap, Pieces, Wrong, gap, report

BF16_LIMIT = 2e-2
FP8_LIMIT = 0.12
"""A value of E4M3 has 3 % of rounding, root mean square, one of E5M2, in which gradients are, 6 %."""
FP8_LEAST = 1e-2
"""A product in bfloat16 alone stays under 3e-3: with less than this there was no FP8."""
ADAM_LIMIT = 1e-5


def pieces() -> Pieces:
    """The pieces by name. Imports Transformer Engine."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    recipes = {
        "tensorwise": recipe.Float8CurrentScaling(), "delayed": recipe.DelayedScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }  # fmt: skip
    return {
        "Linear, bfloat16": lambda: linear(te, None),
        **{f"Linear, {name}": lambda which=each: linear(te, which) for name, each in recipes.items()},
        "LayerNormLinear": lambda: norm_linear(te),
        "FusedAdam": lambda: adam(te.optimizers.FusedAdam),
    }


def linear(te: Any, which: Any) -> Gap:
    """Output and both gradients, in FP8 by the recipe `which` or without."""
    torch.manual_seed(0)
    layer = te.Linear(512, 768, bias=True, params_dtype=torch.bfloat16, device=DEVICE)
    x, grad = (torch.randn(256, width, dtype=torch.bfloat16, device=DEVICE) for width in (512, 768))
    x.requires_grad_()
    for _ in range(2):  # the second has the scales of the first
        x.grad = layer.weight.grad = None
        with te.autocast(enabled=which is not None, recipe=which):
            out = layer(x)
        out.backward(grad)
    expected = linear_expected(*(tensor.detach().double() for tensor in (x, layer.weight, layer.bias, grad)))
    gaps = [gap(computed, wide) for computed, wide in zip((out, x.grad, layer.weight.grad), expected)]
    if which is not None and min(gaps) < FP8_LEAST:
        raise Wrong(f"gaps {', '.join(f'{each:.1e}' for each in gaps)}: this was no FP8")
    largest = torch.tensor(gaps).max().item()  # NaN when one is, where Python's maximum may not be
    return Gap(largest, BF16_LIMIT if which is None else FP8_LIMIT).checked()


def linear_expected(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the input's gradient, the weight's."""
    return x @ weight.T + bias, grad @ weight, grad.T @ x


def norm_linear(te: Any) -> Gap:
    torch.manual_seed(0)
    layer = te.LayerNormLinear(512, 768, normalization="RMSNorm", params_dtype=torch.bfloat16, device=DEVICE)
    x = torch.randn(64, 512, dtype=torch.bfloat16, device=DEVICE)
    normed = F.rms_norm(x.double(), (512,), layer.layer_norm_weight.double(), layer.eps)
    expected = normed @ layer.weight.double().T + layer.bias.double()
    return Gap(gap(layer(x), expected), BF16_LIMIT).checked()


def adam(fused: Any) -> Gap:
    """Three steps beside torch's AdamW."""
    torch.manual_seed(0)
    grad = torch.randn(4096, device=DEVICE)
    results = []
    for kind in (fused, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.ones(4096, device=DEVICE))
        optimizer = kind([parameter], lr=0.1, weight_decay=0.01)
        for _ in range(3):
            parameter.grad = grad.clone()
            optimizer.step()
        results.append(parameter.detach())
    return Gap(gap(results[0], results[1].double()), ADAM_LIMIT).checked()


if __name__ == "__main__":
    sys.exit(report("Transformer Engine", pieces))
