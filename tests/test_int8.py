"""Int8 layers: as near to what they stand for as eight bits allow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from l2m_rag.int8 import Int8Linear, available, to_int8

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no int8 kernels for this CPU")


@given(st.integers(1, 33), st.integers(1, 70), st.integers(1, 9), st.floats(1e-3, 1e3))
@torch.no_grad()
def test_products_are_as_near_as_the_bits_allow(rows: int, width: int, out: int, scale: float) -> None:
    torch.manual_seed(rows * 71 + width)
    linear, x = nn.Linear(width, out, bias=False), scale * torch.randn(2, rows, width)
    wanted, found = linear(x), Int8Linear(linear)(x)
    assert found.shape == wanted.shape
    # inputs have 127 steps and are off by two at most (scale and zero are rounded); weights have 254, off by half
    weight, reach = linear.weight.abs(), float(x.max().clamp(min=0) - x.min().clamp(max=0))
    bound = reach / 127 * weight.sum(1) + weight.amax(1) / 254 * x.abs().sum(-1, keepdim=True)
    assert bool(((found - wanted).abs() <= 2.5 * bound + 1e-6).all())


def test_layers_are_chosen_by_name_and_those_with_a_bias_stay() -> None:
    model = nn.ModuleDict(
        {"up_proj": nn.Linear(8, 8, bias=False), "down_proj": nn.Linear(8, 8, bias=False), "gate": nn.Linear(8, 8)}
    )
    assert to_int8(model, but=("down_proj",)) == 1
    assert isinstance(model["up_proj"], Int8Linear)
    assert type(model["down_proj"]) is type(model["gate"]) is nn.Linear
    assert to_int8(model, but=("down_proj",)) == 0
