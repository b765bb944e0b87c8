"""Cases of the operator on generated Triton kernels, run on the CPU by Triton's interpreter in processes of its own.

The interpreter is chosen when Triton is imported and for the whole process, so tests hand `Job`s to a pool. In a worker
every tensor that is given to a kernel or allocated for it lies between guards of NaN and is NaN until written: what is read
beyond an edge or before it is written shows in the result, and what is written beyond an edge in the guards. bfloat16 is
wrong in the interpreter, and is left to tests on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lsmc
import lsmc.api
import lsmc.pipeline
from lsmc import M, k, outer, q, scalar, v, vector
from lsmc.cases import Case, Sample, sample, tensors
from lsmc.laws import _gradients
from tests.declarations import Drawn, Wider

GUARD = 64
"""Elements of NaN on either side of a tensor."""

TOLERANCE = {"float32": {"": 1e-5}, "float16": {"": 5e-3, "the gradient of": 8e-3, "the gradient of gate": 2e-2}}
TOLERANCE["bfloat16"] = TOLERANCE["float16"]
"""Largest RMS error over the RMS of the float64 recurrence on the same rounded inputs."""

FLOOR = {"float32": 1e-2, "float16": 2e-2, "bfloat16": 2e-2}
"""What cancels is measured against this part of the largest of the outputs, or gradients."""



def bent(block: int) -> lsmc.LSM:
    """A memory with a bias that chunks do not move affinely: tanh in the loss."""
    loss = lsmc.norm2(lsmc.tanh(k @ M + M.bias) - v) / 2
    return lsmc.LSM("own", block=block, update=-scalar("eta") * lsmc.grad(loss, M), readout=q @ M + M.bias)


OWN = {
    "reads twice, forgets along K": lambda: lsmc.LSM(
        "own", decay=lsmc.Vector("g"), update=outer(k, v - 0.5 * (k @ M.decayed) - 0.25 * (k @ M.previous))),
    "decay of an expression, bonus": lambda: lsmc.LSM(
        "own", decay=lsmc.Scalar(-lsmc.softplus(scalar("f"))), update=outer(k, v),
        readout=q @ (M.previous + outer(vector("u", per="head") * k, v))),
    "bent, in blocks": lambda: bent(16),
    "bent, in short blocks": lambda: bent(4),
    "normalised softmax": lambda: lsmc.LSM(
        "own", decay=lsmc.Scalar("g"), update=outer(lsmc.softmax(k), v),
        readout=(lsmc.softmax(q) @ M) / (lsmc.softmax(q) @ M.normalizer + 1e-6)),
}


@dataclass(frozen=True)
class Job:
    """One comparison: a method of the zoo by name, one of `OWN`, or drawn choices, on one case under one schedule."""

    method: str | Drawn | Wider
    case: Case
    schedule: str | None = None
    dtype: str = "float32"
    layout: str = "guarded"  # or "strided", "columns", "expanded"
    gates: str = ""  # the type of what does not enter matrix products, where not `dtype`
    alone: bool = False  # the forward keeps nothing for the backward, whatever pays
    learns: bool = True  # gradients as well
    frozen: tuple[str, ...] = ()  # inputs that want none
    options: tuple[tuple[str, Any], ...] = field(default=())

    def declaration(self) -> Any:
        if not isinstance(self.method, str):
            return self.method.declaration()
        return OWN[self.method]() if self.method in OWN else getattr(lsmc.zoo, self.method)


class Guards(TorchDispatchMode):
    """New floating tensors are NaN and lie between guards of NaN, which `check` finds untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.flat: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and out.is_floating_point() and out.is_contiguous():
            flat = torch.full((out.numel() + 2 * GUARD,), torch.nan, dtype=out.dtype)
            self.flat.append(flat)
            return flat[GUARD : flat.numel() - GUARD].view(out.shape)
        return out

    def check(self) -> None:
        for flat in self.flat:
            assert flat[:GUARD].isnan().all() and flat[-GUARD:].isnan().all(), "a kernel wrote beyond the edge of a tensor"


def arrange(x: Tensor, layout: str) -> Tensor:
    """The values of x in another layout, with NaN around them."""
    shape, rank = list(x.shape), x.ndim
    if layout == "strided" and rank >= 3:  # as a slice of a fused projection whose heads come first
        wide = torch.full([shape[0], shape[2] + 1, shape[1] + 2, *[2 * n + 3 for n in shape[3:]]], torch.nan, dtype=x.dtype)
        out = wide[:, 1:, 1:-1].transpose(1, 2)
        for n in range(3, rank):
            out = out.narrow(n, 2, shape[n])
    elif layout == "columns" and rank >= 3:  # the last dimension has gaps
        out = torch.full([*shape[:-1], 2 * shape[-1]], torch.nan, dtype=x.dtype)[..., ::2]
    else:
        flat = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
        out = flat[GUARD : GUARD + x.numel()].view(shape)
    return out.copy_(x)


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: str) -> dict[str, float]:
    """RMS of the difference over the RMS of what is wanted."""
    rms = {n: float(x.square().mean().sqrt()) if x.numel() else 0.0 for n, x in wanted.items()}
    floor = FLOOR[dtype] * max([1.0, *rms.values()])
    out = {}
    for n, x in found.items():
        assert x.shape == wanted[n].shape, f"{n}: {tuple(x.shape)}, expected {tuple(wanted[n].shape)}"
        bad = int((~torch.isfinite(x)).sum())
        assert not bad, f"{n} has {bad} elements of {x.numel()} that are not finite"
        if x.numel():
            out[n] = float((x.double() - wanted[n]).square().mean().sqrt()) / max(rms[n], floor)
    return out


def bound(name: str, dtype: str) -> float:
    kinds = TOLERANCE[dtype]
    gate = name.startswith("the gradient of") and name.split()[3] not in ("q", "k", "v", "state")
    kind = "the gradient of gate" if gate else "the gradient of" if name.startswith("the gradient of") else ""
    return kinds.get(kind, kinds[""])


def evaluate(op: Any, given: Sample, case: Case, inputs: dict[str, Tensor], state: Any,
             **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of what wants one, by name."""
    o, end = op(**inputs, initial_state=state, return_final_state=True, scale=given.scale, **options)
    outputs = [o.double(), *(x.double() for x in tensors(end))]
    named = inputs | {f"state {n}": x for n, x in enumerate(tensors(state))}
    leaves = {n: x for n, x in named.items() if x.requires_grad}
    gradients = _gradients(outputs, list(leaves.values()), case.seed) if leaves else []
    return ({n: x.detach() for n, x in zip(["o", *(f"final state {n}" for n in range(len(outputs)))], outputs)},
            {f"the gradient of {n}": g.detach() for n, g in zip(leaves, gradients, strict=True)})


@contextlib.contextmanager
def keeping_nothing() -> Iterator[None]:
    """What is compiled meanwhile works out in the backward all that the forward had worked out."""
    lsmc.api._spec_of.cache_clear()
    with patch.object(lsmc.pipeline, "sharings", lambda *_: ()):
        yield
    lsmc.api._spec_of.cache_clear()


def run(job: Job) -> dict[str, float]:
    """The errors of output, final state and all gradients; raises AssertionError with those beyond the tolerance.

    A case whose recurrence grows beyond 1e4 says nothing about rounding: its errors are empty.
    """
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    op, case = job.declaration(), job.case
    options: dict[str, Any] = {}
    if case.cuts:
        options["cu_seqlens"] = torch.tensor([0, *(stop for _, stop in case.pieces)], dtype=torch.int32)
    given = sample(op, case, batch=len(case.pieces) if case.cuts else None)
    dtype = getattr(torch, job.dtype)
    types = {n: dtype if n in "qkv" or not job.gates else getattr(torch, job.gates) for n in given.inputs}
    narrow = {n: x.detach().to(types[n]) for n, x in given.inputs.items()}
    starts = [x.detach().float() for x in tensors(given.state)]
    if job.layout == "expanded":
        narrow = {n: x[:, :, :1].expand(x.shape) if n in given.per_token else x for n, x in narrow.items()}

    learning = {n: job.learns and n not in job.frozen for n in narrow}
    exact = {n: x.double().requires_grad_(learning[n]) for n, x in narrow.items()}
    first = [x.double().requires_grad_(job.learns) for x in starts]
    state = None if not first else first[0] if len(first) == 1 else tuple(first)
    wanted = evaluate(lsmc.reference(op), given, case, exact, state, **options)
    if not all(bool((x.abs() < 1e4).all()) for part in wanted for x in part.values()):
        return {}

    if job.layout != "expanded":
        narrow = {n: arrange(x, job.layout) for n, x in narrow.items()}
    inputs = {n: x.requires_grad_(learning[n]) for n, x in narrow.items()}
    first = [arrange(x, "guarded").requires_grad_(job.learns) for x in starts]
    state = None if not first else first[0] if len(first) == 1 else tuple(first)
    with keeping_nothing() if job.alone else contextlib.nullcontext(), Guards() as guards:
        found = evaluate(op, given, case, inputs, state, chunk=case.chunk, schedule=job.schedule, **options)
    guards.check()
    seen = errors(found[0], wanted[0], job.dtype) | errors(found[1], wanted[1], job.dtype)

    bad = {n: f"{e:.1e}" for n, e in seen.items() if e > bound(n, job.dtype)}
    if bad:  # unless the recurrence itself suffers as much from rounding: as steps in float32, or of its inputs to 16 bits
        step = 0.0 if job.dtype == "float32" else 2**-10
        near = {n: (x.detach() * (1 + step * (torch.rand_like(x) - 0.5))).requires_grad_(learning[n]) for n, x in exact.items()}
        others = [x.double().requires_grad_() for x in starts]
        state = None if not others else others[0] if len(others) == 1 else tuple(others)
        oracle = lsmc.reference(op, torch.float64 if step else torch.float32)
        rough = evaluate(oracle, given, case, near, state, **options)
        suffered = errors(rough[0], wanted[0], job.dtype) | errors(rough[1], wanted[1], job.dtype)
        bad = {n: e for n, e in bad.items() if seen[n] > 4 * suffered[n]}
    assert not bad, f"{job}\nrelative RMS errors {bad}"
    return seen


def _ready() -> None:
    time.sleep(0.2)


class Workers:
    """Processes with the interpreter on."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, *jobs: Job) -> list[dict[str, float]]:
        """The errors of each job; the first failure is raised."""
        futures = [self.pool.submit(run, job) for job in jobs]
        return [f.result() for f in futures]


@contextlib.contextmanager
def workers(count: int) -> Iterator[Workers]:
    """A pool whose processes import Triton with its interpreter, while this one is left as it is."""
    wanted = {"TRITON_INTERPRET": "1", "LSMC_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    before = {n: os.environ.get(n) for n in wanted}
    os.environ.update(wanted)
    try:
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
        for future in [pool.submit(_ready) for _ in range(count)]:
            future.result()
    finally:
        for n, value in before.items():
            if value is None:
                del os.environ[n]
            else:
                os.environ[n] = value
    try:
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)
