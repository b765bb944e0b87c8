"""What the README shows works as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lsmc
from lsmc import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_declaration_is_at_most_ten_lines() -> None:
    code = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(code) <= 10


def test_the_examples_run(tmp_path: Path) -> None:
    declaration, use = blocks("python")
    (tmp_path / "my_method.py").write_text(declaration)
    (tmp_path / "use.py").write_text(
        use + "\nassert o_t.shape == (B, H, V) and state.shape == (B, H, K, V)\n"
    )
    subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True, timeout=120)


def test_the_declared_method_obeys_the_laws(tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(blocks("python")[0])
    cli.main(["check", f"{tmp_path}/my_method.py:leaky_delta", "--examples", "4"])


@pytest.mark.parametrize("line", re.findall(r"^lsmc .*", README, re.MULTILINE))
def test_every_command_line_exists(line: str) -> None:
    words = line.split("#")[0].split()
    assert words[1] in cli.COMMANDS


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_version_is_that_of_the_package() -> None:
    assert f'version = "{lsmc.__version__}"' in (ROOT / "pyproject.toml").read_text()
