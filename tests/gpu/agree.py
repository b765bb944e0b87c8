"""All methods beside the float64 recurrence on a GPU: `python tests/gpu/agree.py [NAMES] [--limit SECONDS] [--out FILE]`.

A process for each method: bfloat16, float32 and float16, lengths around borders of chunks, every range of gates, packed sequences with
empty ones, value heads in groups. Output, final memories and the gradients of all inputs and memories are held to `tests.interpreted.TOLERANCE`;
what exceeds it is compared with what the recurrence suffers when its inputs are rounded once more (float32: when its steps are). `--device cpu` runs
the same on ATen. Exits with 1 where a case fails, and says which cases the time did not reach.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")

import torch
from torch import Tensor

import lsmc
from lsmc.cases import GATES, Case, sample, tensors
from lsmc.zoo import METHODS
from tests.interpreted import bound, errors, evaluate

LENGTHS = (1, 2, 15, 63, 64, 65, 127, 257, 4096)
SIZES: dict[str, tuple[int, int]] = {"rebased": (16, 64), "mamba": (16, 96), "s4": (16, 96), "s4_complex": (16, 96), "gfw_full": (32, 48)}
"""K and V, where they are not 64 and 64: matrices of decays and pairs of keys."""


def cases(name: str) -> Iterator[tuple[str, Case]]:
    """The type and the case; what fails soonest comes first."""
    k, v = SIZES.get(name, (64, 64))
    base = Case(batch=2, time=150, heads=1, groups=2, key_dim=k, value_dim=v, chunk=64, initial_state=True, scale=0.5)
    change = lambda **to: Case(**{**vars(base), **to})  # noqa: E731
    for dtype in ("bfloat16", "float32", "float16"):
        yield dtype, base
        yield dtype, change(batch=1, time=200, cuts=(0, 33, 34, 34, 100))
        for gates in GATES:
            if gates != "typical":
                yield dtype, change(gates=gates)
        for t in LENGTHS:
            yield dtype, change(time=t, batch=1, initial_state=t < 100)


def compare(name: str, dtype: str, case: Case, device: str) -> dict[str, Any]:
    """The errors of one case, those beyond the tolerance, and those beyond what the recurrence suffers as well."""
    op, kind = getattr(lsmc.zoo, name), getattr(torch, dtype)
    given = sample(op, case, batch=len(case.pieces) if case.cuts else None)
    options = {"cu_seqlens": torch.tensor([0, *(stop for _, stop in case.pieces)], dtype=torch.int32, device=device)} if case.cuts else {}
    narrow = {n: x.detach().to(device, kind) for n, x in given.inputs.items()}
    starts = [x.detach().float().to(device) for x in tensors(given.state)]

    def run(function: Any, cast: torch.dtype, noise: float = 0.0, **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = {n: (x.double() * (1 + noise * (torch.rand_like(x, dtype=torch.float64) - 0.5))).to(cast).requires_grad_()
                  for n, x in narrow.items()}
        first = [x.to(torch.promote_types(cast, torch.float32)).clone().requires_grad_() for x in starts]
        state = None if not first else first[0] if len(first) == 1 else tuple(first)
        return evaluate(function, given, case, [*inputs.values(), *first], inputs, state, **options, **more)

    wanted = run(lsmc.reference(op), torch.float64)
    if not all(bool((x.abs() < 1e4).all()) for part in wanted for x in part.values()):
        return {"grows": True}
    found = run(op, kind, chunk=case.chunk)
    seen = errors(found[0], wanted[0], dtype) | errors(found[1], wanted[1], dtype)
    bad = {n: e for n, e in seen.items() if e > bound(n, dtype)}
    row: dict[str, Any] = {"error": seen, "beyond": bad}
    if bad:
        rough = run(lsmc.reference(op, torch.float32), torch.float64) if dtype == "float32" else run(
            lsmc.reference(op), torch.float64, 2 * torch.finfo(kind).eps)
        suffered = errors(rough[0], wanted[0], dtype) | errors(rough[1], wanted[1], dtype)
        row["bad"] = {n: e for n, e in bad.items() if e > 4 * suffered[n]}
    return row


def worker(name: str, until: float, device: str) -> None:
    for dtype, case in cases(name):
        row: dict[str, Any] = {"method": name, "dtype": dtype, "time": case.time, "gates": case.gates, "packed": bool(case.cuts)}
        if time.time() > until:
            print(json.dumps(row | {"stopped": True}), flush=True)
            return
        try:
            row |= compare(name, dtype, case, device)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[-300:]}"
        print(json.dumps(row), flush=True)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("names", nargs="*", metavar="NAMES")
    parse.add_argument("--device", default="cuda")
    parse.add_argument("--limit", type=float, default=500.0)
    parse.add_argument("--out", type=Path)
    parse.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.worker:
        worker(given.names[0], given.worker, given.device)
        return 0
    until = time.time() + given.limit
    names = given.names or [m.name for m in METHODS]
    jobs = {n: subprocess.Popen([sys.executable, __file__, n, "--device", given.device, "--worker", str(until)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for n in names}
    rows: list[dict[str, Any]] = []
    for name, job in jobs.items():
        try:
            out, err = job.communicate(timeout=max(1.0, until + 60 - time.time()))
        except subprocess.TimeoutExpired:
            job.kill()
            out, err = job.communicate()
        rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if job.returncode:
            rows.append({"method": name, "dtype": "", "failed": err[-300:]})
    if given.out:
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = [row for row in rows if row.get("bad") or "failed" in row]
    for name in names:
        for dtype in ("bfloat16", "float32", "float16"):
            mine = [row for row in rows if (row["method"], row["dtype"]) == (name, dtype)]
            worst = max(((e, n) for row in mine for n, e in row.get("error", {}).items()), default=(0.0, "nothing"))
            counts = {w: sum(w in row for row in mine) for w in ("error", "grows", "failed", "stopped")}
            print(f"{name:18} {dtype:9} {counts['error']:3} agree or suffer, worst {worst[0]:.1e} ({worst[1]}),"
                  f" {sum(bool(row.get('beyond')) for row in mine)} beyond the tolerance, {sum(bool(row.get('bad')) for row in mine)} of them wrong,"
                  f" {counts['failed']} failed, {counts['grows']} grow{', stopped' * counts['stopped']}")
    for row in wrong:
        print({n: x for n, x in row.items() if n not in ("error", "beyond")})
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
