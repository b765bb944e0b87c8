"""No file below the declaration knows a method's name: a template chosen by name would not be a compiler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lsmc import zoo

ROOT = Path(__file__).resolve().parents[2]

# Methods that are in the literature and may join the zoo; those in the zoo and among the examples are added.
KNOWN = set(
    """bla retnet gla lightning rebased gfw gateloop deltanet gated_deltanet kda ttt titans
    mamba mamba2 hgrn2 rwkv6 rwkv7""".split()
)
MAY_NAME = ("lsmc/zoo/", "models/configs", "tests/", "docs/", "examples/", "README.md", "CHANGELOG.md")


def test_no_file_below_the_declaration_names_a_method() -> None:
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = KNOWN | set(zoo.names()) | {path.stem for path in (ROOT / "examples").glob("*.py")}
    # gated_deltanet, GatedDeltaNet, gated-deltanet: the same name; "_gla" and "gla2" too, but not "glance".
    spelled = "|".join(
        re.escape(name).replace("_", "[-_ ]?") for name in sorted(names, key=len, reverse=True)
    )
    pattern = re.compile(rf"(?<![a-z])(?:{spelled})(?![a-z])", re.IGNORECASE)
    guilty = []
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if name.startswith(MAY_NAME) or not path.is_file() or path.suffix not in {".py", ".toml", ".json"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            guilty += [f"{name}:{number}: {match.group()}" for match in pattern.finditer(line)]
    assert not guilty, "\n".join(guilty)
