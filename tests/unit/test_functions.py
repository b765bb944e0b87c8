"""The Triton sources of the elementwise functions keep relative accuracy in float32, checked with torch in Triton's place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsmc.functions import FUNCTIONS
from lsmc.reference import _TORCH


class tl:
    """The few functions of triton.language that the sources use."""

    exp, log, sigmoid, erf, sin, cos, abs = (
        torch.exp,
        torch.log,
        torch.sigmoid,
        torch.erf,
        torch.sin,
        torch.cos,
        torch.abs,
    )

    @staticmethod
    def where(condition: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return torch.where(condition, torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def maximum(a: Tensor, b: float) -> Tensor:
        return a.clamp(min=b)

    @staticmethod
    def minimum(a: Tensor, b: float) -> Tensor:
        return a.clamp(max=b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_sources_keep_relative_accuracy(name: str) -> None:
    small = torch.logspace(-7, 0, 500)
    x = torch.cat([torch.linspace(-40, 40, 2001), small, -small])
    if name == "log":
        x = x[x > 0]
    elif name == "log1p":
        x = x[x > -0.99]
    made = eval(FUNCTIONS[name].triton.format("x"), {"tl": tl, "x": x}).double()
    true = _TORCH[name](x.double())
    error = (made - true).abs() / true.abs().clamp(min=1e-30)
    error[(made - true).abs() < 1e-37] = 0
    assert error.max() < 1e-6
