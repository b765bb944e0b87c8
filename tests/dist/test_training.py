"""Laws of `lsmc train --mesh` under torchrun: one run on several processes, through deaths and other meshes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lsmc.runtime.checkpoint import latest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEXT = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer. " for n in range(99, 0, -1)) * 6

# A small model in float64, whose graphs run as they are; rank 1 may meet a signal on its way to a step.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from unittest import mock
import torch
from lsmc.models import HybridMoE, ModelConfig, MoeConfig
from lsmc.runtime import train as training
from lsmc.runtime.data import Batches, DataConfig

out, mesh, resume, fsdp, meets, at, timeout = sys.argv[1:]
torch.manual_seed(0)
moe = MoeConfig(experts=4, top_k=2, width=8)
model = HybridMoE(ModelConfig(pattern="LN", hidden=16, heads=2, vocabulary=256, moe=moe)).double()
plain = Batches.at

def reach(self, step):
    if meets and os.environ.get("RANK") == "1" and step == int(at):
        os.kill(os.getpid(), getattr(signal, meets))
    return plain(self, step)

as_it_is = mock.patch("torch._inductor.compile_fx.compile_fx", lambda module, *_, **__: module.forward)
with as_it_is, mock.patch.object(Batches, "at", reach):
    training.train(training.TrainConfig(
        data=DataConfig(source="text.txt", held_out=0.1), out=Path(out), batch=4, length=16, accumulate=2, steps=7, warmup=2,
        eval_every=3, eval_tokens=200, checkpoint_every=3, log_every=1, device="cpu", mesh=mesh, timeout=float(timeout),
        resume=resume == "resume", fsdp=fsdp == "fsdp"), model)
"""


def start(folder: Path, out: str, mesh: str = "", *, resume: bool = False, fsdp: bool = False, meets: str = "", at: int = 0,
          timeout: float = 300.0) -> subprocess.CompletedProcess[str]:  # fmt: skip
    (folder / "text.txt").write_text(TEXT)
    (folder / "run.py").write_text(SCRIPT)
    count = 1
    for part in mesh.split(",") if mesh else ():
        count *= int(part.split("=")[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0", "--standalone"]
    given = [out, mesh, "resume" if resume else "", "fsdp" if fsdp else "", meets, str(at), str(timeout)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, *(torchrun if mesh else []), "run.py", *given], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def same(folder: Path, out: str) -> None:
    """Metrics of every step, parameters, moments: those of the run on one process."""
    one, other = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", out)
    )
    assert [record["step"] for record in other] == [record["step"] for record in one]
    for a, b in zip(one, other):
        for key in ("loss", "gradient_norm", "held_out"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-8), (key, a["step"])
    for file in ("model.safetensors", "training.safetensors"):
        a, b = (load_file(latest(folder / name) / file) for name in ("one", out))
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key].double(), b[key].double(), rtol=0, atol=1e-8) for key in a)


def test_a_run_on_a_mesh_is_the_run_of_one_process_through_deaths_and_other_meshes(tmp_path: Path) -> None:
    assert start(tmp_path, "one").returncode == 0
    died = start(tmp_path, "other", "tp=2,dp=2", fsdp=True, meets="SIGKILL", at=8)
    assert died.returncode != 0
    assert "rank 1 does not answer" in died.stderr or "Signal 9 (SIGKILL)" in died.stderr
    on = start(tmp_path, "other", "sp=2", resume=True, meets="SIGINT", at=9)
    assert on.returncode == 0, on.stderr
    assert json.loads((latest(tmp_path / "other") / "state.json").read_text())["step"] == 5
    assert start(tmp_path, "other", "dp=2", resume=True).returncode == 0
    same(tmp_path, "other")


def test_a_process_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    """After the timeout, and the half minute that torchrun gives a process to end by itself."""
    hung = start(tmp_path, "hung", "sp=2", meets="SIGSTOP", at=8, timeout=60.0)
    assert hung.returncode != 0
    assert "rank 0 has waited 60 s at step 5: rank 1 does not answer" in hung.stderr
    assert latest(tmp_path / "hung").name == "step-00000003"
