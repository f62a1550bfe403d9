"""Linear layers in int8, for CPUs without bf16 arithmetic: a scale for each row of weights, and one for all inputs.

`torch`'s own kernels (FBGEMM) do the products. Layers whose inputs have a few entries hundreds of times as large as the
rest, as the last of a Llama's MLP has, lose too much to a scale they share, and are named to be left as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer without bias, float32 in and out.

    Args:
        linear: whose weights are rounded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-30).double()
        none = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # to go in a later torch; `available` looks for it
            rounded = torch.quantize_per_channel(weight, scales, none, 0, torch.qint8)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.quantized.linear_prepack(rounded, None)

    def forward(self, x: Tensor) -> Tensor:
        """Give x W^T, (..., out) float32, of x (..., in) float32."""
        # inputs of 7 bits: without it sums of two products overflow on CPUs that have AVX2 only
        found: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed, reduce_range=True)
        return found


def available() -> bool:
    """Say whether this torch has the kernels for this CPU."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch, "quantize_per_channel")


def to_int8(model: nn.Module, *, but: Collection[str] = ()) -> int:
    """Put int8 layers in the place of a model's linear ones that have no bias, in place.

    Args:
        model: for inference on a CPU.
        but: last parts of the names of layers that are left as they are.

    Returns:
        How many layers were changed.
    """
    chosen = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.bias is None and name.rpartition(".")[2] not in but
    ]
    for name, layer in chosen:
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, Int8Linear(layer))
    return len(chosen)
