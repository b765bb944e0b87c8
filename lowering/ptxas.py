"""The assembler that Triton calls: which one it is, what is known of it, and which others are within reach."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

GOOD = (13, 0)
"""The first release on Hopper of which nothing bad is known."""

VARIABLE = "TRITON_PTXAS_PATH"
"""Where Triton looks for another ptxas than its own."""

BAD: dict[tuple[int, ...], str] = {
    (12, 8): "for Hopper it made kernels that read shared memory out of bounds and others that gave wrong numbers, "
             "mostly with blocks of 32 columns",
}
"""What was seen of releases, by their first two numbers."""


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "12.8.93" gives (12, 8, 93)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


@functools.cache
def select() -> None:
    """Let Triton call the newest ptxas within reach that is late enough, where its own is not and nobody has chosen one.

    It holds for all of this process, by the environment variable `VARIABLE`: setting that to any path keeps lsmc from it.
    """
    used = in_use()
    if not os.environ.get(VARIABLE) and used and release(used[1]) < GOOD and (path := newer()):
        os.environ[VARIABLE] = path


def sound() -> bool:
    """Whether nothing bad is known of the ptxas in use."""
    used = in_use()
    return used is not None and not trouble(used[1])


def in_use() -> tuple[str, str] | None:
    """Path and version of the ptxas that Triton will call; None without Triton or a ptxas that runs."""
    path = os.environ.get(VARIABLE)
    if not path:
        try:
            import triton
        except ImportError:
            return None
        path = str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    version = version_of(path)
    return (path, version) if version else None


@functools.cache
def version_of(path: str) -> str | None:
    """What a ptxas says of itself; None when it does not run."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match.group(1) if match else None


def trouble(version: str) -> str:
    """What is known against a release; empty where it is late enough."""
    if release(version) >= GOOD:
        return ""
    known = BAD.get(release(version)[:2])
    return f"{version}: {known}" if known else f"{version} is older than {'.'.join(map(str, GOOD))}, advised on Hopper"


def newer() -> str | None:
    """The newest other ptxas within reach that is late enough: of the package nvidia-cuda-nvcc, or of a CUDA toolkit."""
    places = [*(Path(path) / "nvidia" for path in sys.path if path.endswith("site-packages")), Path("/usr/local")]
    found = [str(path) for place in places if place.is_dir() for path in place.glob("cu*/bin/ptxas")]
    found += filter(None, [shutil.which("ptxas")])
    versions = {path: release(version) for path in found if (version := version_of(path))}
    best = max(versions, key=lambda path: versions[path], default=None)
    return best if best and versions[best] >= GOOD else None
