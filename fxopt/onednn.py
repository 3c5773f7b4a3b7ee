"""A linear layer through oneDNN, on weights as they lie.

    onednn_linear(x [..., K], weight [N, K], bias [N] or None)  →  [..., N]

PyTorch has the call, and keeps it for weights that were packed beforehand: Inductor takes no others. This operator
is that call under a name of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_SIGNATURE = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"

torch.library.define("fxopt::onednn_linear", _SIGNATURE, tags=(torch.Tag.needs_fixed_stride_order,))


def is_built_in() -> bool:
    """Whether this PyTorch has oneDNN, and the call."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.library.impl("fxopt::onednn_linear", "CPU")
def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], None)
    return result


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_fake("fxopt::onednn_linear", _fake)


onednn_linear = torch.ops.fxopt.onednn_linear.default


@register_flop_formula(torch.ops.fxopt.onednn_linear)
def _flops(x: Sequence[int], weight: Sequence[int], *others: object, **more: object) -> int:
    """A product and a sum for each number of the weight, for each row."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]
