"""Plain facts about the machines that cost models compare against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A machine: memory rate (bytes/s), matrix rate (FLOP/s), parallel units, launch (s), shared memory (bytes)."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    units: int
    launch_s: float
    step_s: float  # latency of one dependent matrix product inside a kernel
    shared_bytes: int


# Copy and matmul rates measured on the device; 132 multiprocessors and 227 KB from NVIDIA's Hopper tuning guide.
H200 = Target("H200", 4.245e12, 7.97e14, 132, 5e-6, 0.6e-6, 227 * 1024)
