"""What this machine has, what of lsmc works on it, and what to change: ``lsmc doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsmc.lowering import ptxas
from lsmc.lowering.ptxas import release

Status = Literal["ok", "warn", "bad", "info"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what to do about it (empty: nothing)."""

    subject: str
    found: str
    status: Status = "ok"
    advice: str = ""


def diagnose() -> list[Finding]:
    """Looks; changes nothing and reaches no network."""
    return [
        *_python(),
        *_packages(),
        *_compilers(),
        *_gpu(),
        *_ptxas(),
        *_abilities(),
    ]


def _python() -> list[Finding]:
    version = platform.python_version()
    return [Finding("python", f"{version} ({sys.executable})")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for package, least in [("torch", (2, 11)), ("triton", (3, 6)), ("numpy", (1, 26)), ("sympy", (1, 13))]:
        version = _version(package)
        needed = ".".join(map(str, least))
        if version is None:
            status: Status = "warn" if package == "triton" else "bad"
            findings.append(Finding(package, "not installed", status, f"pip install '{package}>={needed}'"))
        elif release(version) < least:
            findings.append(Finding(package, version, "bad", f"lsmc needs {package} {needed} or later"))
        else:
            findings.append(Finding(package, version))
    numpy, triton = _version("numpy"), _version("triton")
    if numpy and triton and release(numpy) >= (2, 4) and release(triton) < (3, 7):
        advice = "only for running kernels on the CPU (TRITON_INTERPRET=1): pip install 'numpy<2.4'"
        findings.append(Finding("numpy with triton", f"{numpy} with {triton}", "warn", advice))
    for package, purpose in [
        ("hypothesis", "lsmc check"),
        ("datasets", "training on a Hugging Face data set"),
    ]:
        version = _version(package)
        advice = "" if version else f"for {purpose}: pip install {package}"
        findings.append(Finding(package, version or "not installed", "ok" if version else "info", advice))
    return findings


def _first_line(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return (result.stdout or result.stderr).strip().splitlines()[0]


def _compilers() -> list[Finding]:
    findings = []
    for tool, variable, purpose in [
        ("gcc", "CC", "Triton's launchers"),
        ("g++", "CXX", "torch.compile on the CPU"),
    ]:
        command = os.environ.get(variable, tool)
        found = _first_line(command, "--version")
        if found is None:
            advice = f"{purpose} cannot be built; on Debian: apt-get install {tool}, or point {variable} at a compiler"
            findings.append(Finding(tool, f"{command} does not run", "bad", advice))
        else:
            findings.append(Finding(tool, found))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        findings.append(Finding("Python.h", "missing", "bad", "on Debian: apt-get install python3-dev"))
    return findings


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        build = (
            "a CPU build of torch"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda}"
        )
        advice = "CUDA kernels cannot run here; everything else does"
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            advice = "this machine has an NVIDIA driver: install a CUDA build of torch to use it"
        return [Finding("GPU", f"none usable ({build})", "info", advice)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors, "
            f"CUDA {torch.version.cuda}"
        )
        old = (properties.major, properties.minor) < (8, 0)
        advice = "bfloat16 matrix units start at sm_80: kernels will be slow or fail" if old else ""
        findings.append(Finding(f"GPU {index}", found, "warn" if old else "ok", advice))
    return findings


def _select_ptxas() -> str:
    newer = ptxas.newer()
    if newer:
        return f"export TRITON_PTXAS_PATH={newer}"
    good = ".".join(map(str, ptxas.GOOD))
    return f"pip install 'nvidia-cuda-nvcc>={good}'; lsmc doctor then names its path for TRITON_PTXAS_PATH"


def _ptxas() -> list[Finding]:
    if _version("triton") is None:
        return []
    ptxas.select()
    used = ptxas.in_use()
    if used is None:
        chosen = os.environ.get("TRITON_PTXAS_PATH")
        advice = "TRITON_PTXAS_PATH does not name a ptxas that runs" if chosen else _select_ptxas()
        return [Finding("ptxas", f"{chosen or 'none'} does not run", "warn", advice)]
    path, version = used
    source = "TRITON_PTXAS_PATH" if os.environ.get("TRITON_PTXAS_PATH") else "Triton's own"
    found = f"{version} ({source}: {path})"
    if trouble := ptxas.trouble(version):
        advice = f"{trouble}; plans are checked before lsmc tune adopts them, yet choose another: {_select_ptxas()}"
        return [Finding("ptxas", found, "warn", advice)]
    return [Finding("ptxas", found)]


def _abilities() -> list[Finding]:
    """What follows from the above, in the user's terms."""
    import torch

    triton, compiler = _version("triton"), _first_line(os.environ.get("CXX", "g++"), "--version")
    gpu = torch.cuda.is_available()
    findings = [Finding("works: operators on the CPU", "yes, float64 to bfloat16")]
    if compiler:
        findings.append(Finding("works: torch.compile on the CPU", "yes"))
    else:
        findings.append(Finding("works: torch.compile on the CPU", "no", "bad", "install g++"))
    if gpu and triton:
        findings.append(Finding("works: Triton kernels on the GPU", "yes"))
    else:
        advice = "needs an NVIDIA GPU, a CUDA build of torch, and Triton"
        findings.append(Finding("works: Triton kernels on the GPU", "no", "info", advice))
    if triton:
        how = "yes: TRITON_INTERPRET=1, float32 and float16 (its bfloat16 is wrong)"
        findings.append(Finding("works: Triton kernels on the CPU", how))
    threads = torch.get_num_threads()
    findings.append(Finding("threads", f"{threads} of {os.cpu_count()} cores", "ok"))
    return findings
