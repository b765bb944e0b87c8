"""What is in the repository is what a user installs, and nothing asks for a CUDA build behind their back."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("lowering", "runtime", "models")


def git(*args: str) -> list[str]:
    result = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tracked files alone, built outside the checkout so that nothing stale can slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for line in git("ls-files", "-s"):
        mode, name = line.split()[0], line.split("\t")[1]
        target = source / name
        if not (ROOT / name).exists():
            continue  # deleted, not yet committed
        target.parent.mkdir(parents=True, exist_ok=True)
        if mode == "120000":
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(out), str(source)], check=True, timeout=120)
    return next(out.glob("*.whl"))


def test_every_tracked_package_file_reaches_the_wheel(wheel: Path) -> None:
    wanted = set()
    for name in git("ls-files", "lsmc", *LINKED):
        if (
            name in {f"lsmc/{folder}" for folder in LINKED}
            or name.endswith(".md")
            or not (ROOT / name).exists()
        ):
            continue
        wanted.add(name if name.startswith("lsmc/") else f"lsmc/{name}")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert wanted - packed == set(), "tracked, but not in the wheel: a file type missing from package-data?"
    assert {name for name in packed if not name.startswith("lsmc/")} == set(), (
        "the wheel leaks top-level packages"
    )


def test_the_installed_wheel_imports_its_linked_packages(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = "import lsmc.lowering, lsmc.runtime, lsmc.models; print(lsmc.models.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path))


@pytest.mark.parametrize("folder", LINKED)
def test_links_are_committed_as_links(folder: str) -> None:
    [entry] = git("ls-files", "-s", f"lsmc/{folder}")
    assert entry.startswith("120000 ")
    assert (ROOT / "lsmc" / folder).resolve() == ROOT / folder


def test_linked_packages_are_modules_of_lsmc() -> None:
    import lsmc.lowering
    import lsmc.models
    import lsmc.runtime

    for module in (lsmc.lowering, lsmc.runtime, lsmc.models):
        assert module.__name__.startswith("lsmc.")
        assert Path(module.__file__).resolve().is_relative_to(ROOT)


def test_pinned_requirements_never_ask_for_a_cuda_build() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        for line in filter(None, lines):
            if line.startswith("--"):
                assert line == "--extra-index-url https://download.pytorch.org/whl/cpu"
                continue
            assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.+]*", line), f"{path.name}: {line} is not pinned"
            assert not re.match(r"nvidia|cuda|cupy", line)
            if line.startswith("torch=="):
                assert line.endswith("+cpu")
    assert "torch==2.13.0+cpu" in (ROOT / "requirements/cpu.txt").read_text()


def test_make_installs_without_resolving_dependencies() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "$(PIP) install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "--no-deps" in line
        assert "--retries 0" in line


def test_pinned_requirements_satisfy_the_declared_dependencies() -> None:
    from packaging.requirements import Requirement

    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        pins.update(re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["test"] + extras["dev"]:
        requirement = Requirement(text)
        if requirement.name == "lsmc":
            continue
        assert requirement.specifier.contains(pins[requirement.name].split("+")[0]), text


def test_importing_lsmc_installs_nothing_at_top_level() -> None:
    for path in git("ls-files", "*.py"):
        text = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        found = re.findall(r"^\s*(?:from|import) (?:lowering|runtime|models)\b", text, re.MULTILINE)
        assert not found, f"{path}: import lsmc.<name> instead"
