"""Recorded launches: what is repeated reads the tensors given this time and writes what is returned this time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from lsmc.lowering.backends.triton_record import Launched, Recording, Room, likeness


def numbers(address: int, n: int) -> Any:
    return (ctypes.c_float * n).from_address(address)


class Twice:
    """Stands for a compiled kernel on CPU memory: o = 2 x, and a copy into room of its own."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(p_x: int, t_1: int, o_y: int, size: int, stream: object) -> None:
            for i in range(size):
                numbers(t_1, size)[i] = 2 * numbers(p_x, size)[i]
                numbers(o_y, size)[i] = numbers(t_1, size)[i]

        return launch


class Add:
    """o += t, on room that starts at zero."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(t_1: int, o_z: int, unread: int, size: int, stream: object) -> None:
            assert unread == 0
            for i in range(size):
                numbers(o_z, size)[i] += numbers(t_1, size)[i]

        return launch


@given(st.integers(1, 40), st.integers(1, 3))
def test_a_repeated_launch_reads_what_is_given_and_writes_what_is_returned(size: int, calls: int) -> None:
    first, made, y, z = (torch.zeros(size) for _ in range(4))
    rooms = [Room(y, False), Room(made, False), Room(z, True)]
    launched = [Launched(Twice(), 1, {"p_x": first, "t_1": made, "o_y": y, "size": size}),
                Launched(Add(), 1, {"t_1": made, "o_z": z, "i_M": first, "size": size})]
    recording = Recording(launched, rooms, [y, z], ["p_x"])
    seen = []
    for _ in range(calls):
        x = torch.randn(size)
        out = recording.repeat({"p_x": x}, torch.device("cpu"))
        assert all(torch.equal(o, 2 * x) for o in out)
        seen += out
    assert len({o.data_ptr() for o in seen}) == len(seen)


def test_calls_are_alike_exactly_when_kernels_would_be_compiled_alike() -> None:
    x = torch.randn(4, 33)
    alike = likeness([("x", x)])
    assert alike == likeness([("x", torch.randn(4, 33))])
    others = [x.half(), x[:3], x.t(), x[:, 1:], torch.randn(133)[1:].view(4, 33)]
    assert all(likeness([("x", o)]) != alike for o in others)
    assert likeness([("y", x)]) != alike
    assert likeness([("x", x), ("m", None)]) == alike
