"""Compile generated kernels for Hopper (sm_90a) on any machine: registers, spills and shared memory.

    resources(compiled, key=128, value=128)   →  one `Resources` per kernel

Needs Triton with its own ptxas, no GPU. Not available in a process that runs Triton's interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lsmc.lowering import ptxas
from lsmc.lowering.backends.triton import Compiled, plan_of
from lsmc.lowering.backends.triton_emit import Emitted

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on the device; spills are bytes a thread stores to local memory; `serial` says why the assembler lets
    no two products of the matrix units run on, one behind the other, and is empty where it does."""

    kernel: str
    registers: int
    spills: int
    shared: int
    wgmma: int
    warps: int
    stages: int
    serial: str = ""

    def __str__(self) -> str:
        return (f"{self.kernel}: {self.registers} registers, {self.spills} B spilled, {self.shared / 1024:.0f} KB shared, "
                f"{self.wgmma} wgmma, {self.warps} warps, {self.stages} stages"
                f"{f', one product at a time: {self.serial}' if self.serial else ''}")


def resources(compiled: Compiled, key: int = 128, value: int = 128, chunk: int = 64, dtype: str = "bf16",
              sequences: int = 128, **plan: int) -> list[Resources]:
    """Compile every kernel of a program for the given sizes; `plan` overrides blocks, `num_warps` and `num_stages`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton's interpreter is on in this process (TRITON_INTERPRET=1): compile in another one")
    return [resource(compiled, k, key, value, chunk, dtype, plan_of(k, key, value, sequences, chunk) | plan)
            for k in compiled.kernels]


def resource(compiled: Compiled, k: Emitted, key: int, value: int, chunk: int, dtype: str, plan: dict[str, int]) -> Resources:
    """What one kernel takes under a plan."""
    used = ptxas.in_use()
    if used is None:
        raise RuntimeError("no ptxas that runs: lsmc doctor says more")
    function: Any = compiled.functions[k.name]
    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    plan = dict(plan)
    value = key if k.kernel.part == "factor" else value
    options = {o: plan.pop(o) for o in ("num_warps", "num_stages", "maxnreg") if o in plan}
    chunk = 1 if k.kernel.walks else chunk
    rows = chunk if k.walks else max(chunk, 16)
    constants: dict[str, Any] = {"C": rows, "STEP": chunk, "LEVELS": rows.bit_length() - 1, "K": key, "V": value, "PACKED": False,
                                 "HOW": {"first": 0, "fast": 0, "slow": 1}.get(k.how, 2),
                                 "DT": types[dtype], **plan}
    constants |= {"T": 1} if k.kernel.walks else {}  # a step
    constants |= {"LED": False} if "LED" in function.arg_names else {}
    exact = {f"s_{c.name}" for c in (*k.carries, *k.loads) if k.kernel.part == "combine" or k.kernel.of(compiled.program).index[
        c.inp].dims[0] == "1"}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(function.arg_names):
        if name.startswith("sg_"):
            constants[name] = 1  # as many heads of every input, as launches compile it
        if name.startswith("HAS_"):
            constants[name] = not name.startswith("HAS_d_")  # nothing is asked of the last memories
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in exact:
            signature[name] = "*fp32"
        elif name.startswith(("p_", "o_", "t_", "s_")):
            signature[name] = f"*{dtype}"
        elif name.startswith(("i_", "e_")):
            signature[name] = "*fp32"
        elif name in ("owner", "_flags", "seen"):
            signature[name] = "*i32"
        elif name in ("cu", "first"):
            signature[name] = "*i64"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name.startswith(("sb_", "st_", "sh_")):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [used[0], "-v", "--gpu-name=sm_90a", str(path), "-o", str(path) + ".o"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{used[0]} failed on {k.name} ({run.returncode}): {(run.stderr or run.stdout).strip()[-1000:]}")
    report = run.stderr

    reason = re.search(r"wgmma\S* instructions are serialized due to (.*?) (?:in|for) the function", report)

    def number(pattern: str) -> int:
        return int((re.search(pattern, report) or [0, 0])[1])

    return Resources(k.name, number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), made.metadata.shared,
                     ptx.count("wgmma.mma_async"), options["num_warps"], options["num_stages"], reason[1] if reason else "")
