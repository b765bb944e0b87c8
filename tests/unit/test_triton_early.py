"""Laws of kernels whose loads are under way early, on what Triton makes of real kernels: where copies begin, how long buffers
live, and that nothing is read before its copy was waited for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

KERNELS = {"gla": "gla_backward_chunks", "deltanet": "deltanet_backward_chunks", "mamba2": "mamba2_backward_chunks_K",
           "kda": "kda_prepare"}
SCRIPT = """
import json, sys
from lsmc import zoo
from lsmc.lowering.backends import triton_early
from lsmc.lowering.backends.triton import plan_of
from lsmc.lowering.offline import resource
from lsmc.pipeline import Options, compile_plan
from lsmc.schedules import Shape

texts, rewritten = {}, triton_early.rewritten
def seen(text):
    texts[name] = text
    return rewritten(text)
triton_early.rewritten = seen
out = {}
for method, name in json.loads(sys.argv[1]).items():
    plan = compile_plan(getattr(zoo, method).canonical, Options(target="triton", fresh=True), Shape(128, 4096, 128, 128, 64))
    for direction in (plan.training, plan.backward):
        for k in direction.executable.kernels:
            if k.name == name:
                usual = plan_of(k, 128, 128, 128, 64)
                found = [resource(direction.executable, k, 128, 128, 64, "bf16", usual | {"EARLY": room}) for room in (0, 112)]
                out[name] = [texts[name], *(r.shared for r in found)]
json.dump(out, sys.stdout)
"""
COPIED = """
import sys
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as copied
from lsmc import zoo
from lsmc.pipeline import Options, compile_plan

made = compile_plan(zoo.retnet.canonical, Options(target="triton", fresh=True, schedule="two_pass")).backward.executable
name = next(k.name for k in made.kernels if k.early)
text = copied(made.functions[name])
open(sys.argv[1], "w").write("import triton\\nimport triton.language as tl\\n@triton.jit\\n" + text.lstrip() + f"\\nkernel = {name}\\n")
"""
"""Writes a kernel as Inductor does, into a module of its own."""
ELSEWHERE = """
import sys
import module, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

assert "lsmc" not in sys.modules
constants = {"C": 64, "STEP": 64, "LEVELS": 6, "K": 64, "V": 64, "BK": 64, "BV": 64, "PACKED": False, "HOW": 2, "DT": tl.bfloat16,
             "AHEAD": 0, "EARLY": 112}
names = module.kernel.arg_names
constants = {n: 1 if n.startswith("sg_") else constants[n] for n in names if n.startswith("sg_") or n in constants}
types = {n: "constexpr" if n in constants else "*bf16" if n[:2] in ("p_", "o_", "t_", "s_") else "*i64" if n in ("cu", "first") else
         "*i32" if n in ("owner", "_flags") else "i32" for n in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*" or n[:3] in ("sb_", "st_", "sh_")}
made = triton.compile(ASTSource(fn=module.kernel, signature=types, constexprs=constants, attrs=aligned),
                      target=GPUTarget("cuda", 90, 32))
print(made.asm["ttgir"].count("async_copy_global_to_local"))
"""
COPY = re.compile(r"    (%early_\d+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+)x(\w+),")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Of each kernel: what Triton made of it, and its shared memory without early loads and with them."""
    return dict(json.loads(alone(SCRIPT, json.dumps(KERNELS), folder=tmp_path_factory.mktemp("triton"))))


def alone(script: str, *args: str, folder: Path) -> str:
    """What a script prints in a process of its own, without Triton's interpreter; it finds modules in `folder`, too."""
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(folder / "cache")  # what is there already would not be made again
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kernels_that_inductor_copies_are_rewritten_where_lsmc_was_never_imported(tmp_path: Path) -> None:
    alone(COPIED, str(tmp_path / "module.py"), folder=tmp_path)
    assert int(alone(ELSEWHERE, folder=tmp_path)) > 0


def with_room(text: str, room: int) -> str:
    """The same kernel, asking for other shared memory."""
    called = re.search(r'"// early, \w+: \$1" \{.*?\} (%\w+)', text)
    assert called
    return re.sub(rf"({called[1]} = arith\.constant )\d+", rf"\g<1>{room}", text)


@pytest.mark.parametrize("name", KERNELS.values())
@given(room=st.integers(0, 240_000))
def test_copies_are_waited_for_before_they_are_read_and_live_within_their_room(
        compiled: dict[str, list[object]], name: str, room: int) -> None:
    from lsmc.lowering.backends.triton_early import rewritten

    old = with_room(str(compiled[name][0]), room)
    lines = rewritten(old).split("\n")
    under_way, there, size, buffers = list[str](), set[str](), dict[str, int](), dict[str, str]()
    last = {n: i for i, line in enumerate(lines) for n in re.findall(r"%\w+", line)}
    known = set[str]()
    for i, line in enumerate(lines):
        made = re.match(r"    (%\w+)(?::\d+)? = ", line)
        if line.startswith("    ") and made:  # straight code: names are defined before they are taken
            assert all(n in known for n in re.findall(r"%\w+", line.split(" = ", 1)[1]) if n.startswith("%early")), line
            known.add(made[1])
        if m := COPY.match(line):
            size[m[1]] = int(m[2]) * int(m[3]) * {"bf16": 2, "f32": 4}[m[4]]
            buffers[m[1]] = m[1]
        elif m := re.match(r"    (%early_\d+)_copied = ttg\.async_commit_group", line):
            under_way.append(m[1])
        elif m := re.match(r"    (%early_\d+)_there = ttg\.async_wait %\w+ \{num = (\d+)", line):
            while len(under_way) > int(m[2]):
                there.add(under_way.pop(0))
            assert m[1] in there, line
        elif m := re.match(r"    (%\w+) = ttg\.memdesc_trans (%\w+)", line):
            if m[2] in buffers:
                buffers[m[1]] = buffers[m[2]]
        elif "async_copy_global_to_local" not in line:
            assert all(buffers[n] in there for n in re.findall(r"%\w+", line) if n in buffers), line
        alive = sum(s for b, s in size.items() if max(last[n] for n, of in buffers.items() if of == b) >= i)
        assert alive <= room
    if not size:
        assert lines == old.split("\n")
    loads = sum(" = tt.load " in line for line in old.split("\n"))
    assert sum(" = tt.load " in line for line in lines) + len(size) == loads, "each load is there, or copied"


@pytest.mark.parametrize("name", [n for n in KERNELS.values() if "chunks" in n])
def test_loads_are_under_way_and_two_programs_still_share_a_multiprocessor(compiled: dict[str, list[object]], name: str) -> None:
    from lsmc.target import H200

    _, late, early = compiled[name]
    assert isinstance(late, int) and isinstance(early, int)
    assert 2 * (early + 1024) <= H200.shared_bytes + 1024
    assert early > late, "loads under way take shared memory"


def test_text_that_does_not_ask_stays_as_it_is(compiled: dict[str, list[object]]) -> None:
    from lsmc.lowering.backends.triton_early import MARK, rewritten

    for text, *_ in compiled.values():
        other = str(text).replace(MARK, "// something else")
        assert rewritten(other) == other
