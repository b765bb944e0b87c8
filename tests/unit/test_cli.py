"""The command line: what it prints, and that a user's mistake ends in one readable message and exit status 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lsmc import cli, zoo
from lsmc.errors import LsmNameError
from lsmc.lowering import ptxas
from lsmc.resolve import LsmFileError, resolve
from lsmc.runtime import bench, doctor
from lsmc.runtime.errors import LsmConfigError

OWN_METHOD = """
from lsmc import LSM, Scalar, k, outer, v
leaky = LSM("leaky", decay=Scalar("g"), update=outer(k, v))
number = 3
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN_METHOD)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    else:
        status = 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(command in out for command in cli.COMMANDS)


def test_list_shows_what_every_method_is(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "list")
    assert status == 0
    head, *rows = out.partition("\n\n")[0].splitlines()
    assert head.split() == "method decay update state chunk form backends decode packed message between ranks".split()
    found = {row.split()[0]: " ".join(row.split()) for row in rows}
    assert list(found) == list(zoo.names())
    assert found["gla"] == "gla vector K outer product K·V products aten triton yes yes K + K·V"
    assert found["titans"] == "titans scalar delta, momentum K·V + K·V solve aten triton yes yes 2K·2K + K·V + K·V"
    assert found["mamba"].startswith("mamba matrix outer product K·V scan")


@pytest.mark.parametrize("stage", ["canonical", "chunk", "schedule"])
def test_explain_prints_one_stage(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    status, out, _ = run(capsys, "explain", "gla", "--stage", stage)
    assert status == 0
    assert out.strip()


def test_explain_lists_its_stages_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "gla", "--stage", "list")
    assert status == 0
    assert "chunk" in out.split()
    status, _, err = run(capsys, "explain", "gla", "--stage", "nonsense")
    assert status == 1
    assert "there is no stage 'nonsense'" in err
    assert "help: the stages are" in err


def test_explain_counts_what_ranks_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    """K·V float32 numbers for each of 2 heads and 2 sequences, K = V = 64, from the one other rank, and as many backward."""
    status, out, _ = run(capsys, *"explain bla --mesh sp=2 --pattern L --batch 2 --tokens 16".split())
    assert status == 0
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert any(row.startswith("sp memories of bla 1 all-gather 65,536") and row.count("65,536") == 2 for row in rows), out
    status, _, err = run(capsys, *"explain bla --mesh cp=2".split())
    assert status == 1
    assert "'cp=2' is no axis with its size" in err


def test_check_tests_a_method_in_the_users_own_file(
    capsys: pytest.CaptureFixture[str], own_file: Path
) -> None:
    status, out, _ = run(capsys, "check", f"{own_file}:leaky", "--examples", "3")
    assert status == 0
    assert "leaky: 7 laws hold" in out


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nonsense", "no method is called 'nonsense'"),
        ("missing.py:gla", "there is no file missing.py"),
        ("{own}", "which declaration of the file?"),
        ("{own}:", "which declaration of the file?"),
        ("own.txt:leaky", "own.txt is not a Python file"),
        ("{own}:absent", "it declares leaky"),
        ("{own}:number", "number is not a declaration"),
    ],
)
def test_a_mistake_ends_in_one_message(
    capsys: pytest.CaptureFixture[str], own_file: Path, method: str, message: str
) -> None:
    status, out, err = run(capsys, "explain", method.format(own=own_file))
    assert (status, out) == (1, "")
    assert err.startswith("lsmc.LsmNameError: ")
    assert message in err
    assert "help: " in err
    assert "Traceback" not in err


def test_a_mistake_in_the_users_file_shows_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "wrong.py"
    path.write_text('from lsmc import LSM, Scalar, k, outer\nbad = LSM("bad", decay=Scalar("g"), update=k)\n')
    status, _, err = run(capsys, "explain", f"{path}:bad")
    assert status == 1
    assert "wrong.py:2: " in err


@pytest.mark.parametrize(
    ("program", "kind", "line", "underlined"),
    [
        ("x = LSM(", "LsmFileError", 2, ""),
        ("import nowhere", "LsmFileError", 2, "import nowhere"),
        ('x = LSM("x", update=gain * outer(k, v))', "LsmUnknownSymbolError", 2, "gain"),
        ('x = LSM("x", decays=1, update=outer(k, v))', "LsmFileError", 2, 'LSM("x", decays=1, update=outer(k, v))'),
        ("x = LSM('x',\n  update=outer(k, 1 / 0))", "LsmFileError", 3, "1 / 0"),
        ('x = LSM("x", update=outer(k, tanh(v - k @ M)))', "LsmNotAffineError", 2, "outer(k, tanh(v - k @ M))"),
        ('x = LSM("x", decay=Matrix("A"), update=outer(k, v - k @ M))', "LsmNoChunkFormError", 2, 'Matrix("A")'),
    ],
)
def test_whatever_goes_wrong_in_the_users_file_is_shown_at_its_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, program: str, kind: str, line: int, underlined: str
) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(f"from lsmc import *\n{program}\n")
    status, out, err = run(capsys, "check", f"{path}:x")
    assert (status, out) == (1, "")
    assert err.startswith(f"lsmc.{kind}: wrong.py:{line}: ")
    assert "Traceback" not in err
    shown, below, *_ = err.splitlines()
    if underlined:
        assert shown[below.index("^") : below.rindex("^") + 1] == underlined


def test_a_file_is_imported_once(own_file: Path) -> None:
    assert resolve(f"{own_file}:leaky") is resolve(f"{own_file}:leaky")


def test_a_file_that_fails_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text("raise RuntimeError('not yet')")
    with pytest.raises(LsmFileError, match="not yet"):
        resolve(f"{path}:leaky")
    path.write_text(OWN_METHOD)
    assert resolve(f"{path}:leaky").name == "leaky"


def test_method_names_of_the_zoo_resolve() -> None:
    assert resolve(zoo.names()[0]) is zoo.METHODS[0]
    with pytest.raises(LsmNameError):
        resolve("names")


@pytest.mark.parametrize("command", ["train", "generate"])
def test_training_commands_list_their_settings(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert "--seed" in out


def test_training_settings_come_from_a_size_or_a_file(tmp_path: Path) -> None:
    from lsmc.runtime.train import TrainConfig, to_json

    assert cli._train_config("a1b-7b").model == "a1b-7b"
    config = TrainConfig(steps=7, out=tmp_path / "run", clip=0.5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(config)))
    assert cli._train_config(str(path)) == config


def test_a_broken_training_file_is_a_users_mistake(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"stepps": 3}')
    status, _, err = run(capsys, "train", str(path))
    assert status == 1
    assert "stepps" in err


def test_doctor_reports_and_advises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert all(word in out for word in ("python", "torch", "triton", "numpy", "gcc", "GPU", "ptxas"))


@pytest.mark.parametrize(("version", "said"), [("12.8.93", "wrong numbers"), ("12.9.1", "older than 13.0")])
def test_doctor_warns_of_an_old_ptxas_and_names_a_newer_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, said: str
) -> None:
    for path, answer in (("old/ptxas", version), ("site-packages/nvidia/cu13/bin/ptxas", "13.3.27")):
        tool = tmp_path / path
        tool.parent.mkdir(parents=True)
        tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, V{answer}'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "old/ptxas"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site-packages")])
    [finding] = doctor._ptxas()
    assert finding.status == "warn"
    assert said in finding.advice
    assert f"TRITON_PTXAS_PATH={tool}" in finding.advice
    monkeypatch.setattr(ptxas, "newer", lambda: None)
    [finding] = doctor._ptxas()
    assert "pip install 'nvidia-cuda-nvcc>=13.0'" in finding.advice
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    [finding] = doctor._ptxas()
    assert (finding.status, finding.advice) == ("ok", "")


@pytest.mark.parametrize("own", ["12.8.93", "13.2.0"])
def test_a_newer_ptxas_is_used_where_the_own_one_is_old_and_nobody_chose(monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    monkeypatch.setattr(ptxas, "newer", lambda: "/a/newer/ptxas")
    monkeypatch.setattr(ptxas, "in_use", lambda: (os.environ.get(ptxas.VARIABLE, "own"), own))
    for chosen in ("/chosen/ptxas", ""):
        monkeypatch.setenv(ptxas.VARIABLE, chosen)
        ptxas.select.__wrapped__()
        assert os.environ[ptxas.VARIABLE] == (chosen or "/a/newer/ptxas" * (own == "12.8.93"))


def test_doctor_says_which_tool_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    bad = [finding for finding in doctor.diagnose() if finding.status == "bad"]
    assert {finding.subject for finding in bad} == {"g++", "works: torch.compile on the CPU"}
    assert all(finding.advice for finding in bad)


def test_bench_measures_times_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "times.json"
    status, text, _ = run(
        capsys, "bench", "gla", "--shapes", "1,64,2,8,8", "--device", "cpu", "--out", str(out), "--markdown"
    )
    assert status == 0
    assert text.startswith("| method |")
    [result] = json.loads(out.read_text())["results"]
    assert result["shape"] == [1, 64, 2, 8, 8]
    assert set(result["runs"]) == {"eager", "loop"}
    for found in result["runs"].values():
        assert found["forward_backward_ms"] > 0
        assert set(found["errors"]) == {"o", "q", "k", "v", "g"}
        assert max(found["errors"].values()) < 1e-4


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,0,4", "a,b,c,d,e", ""])
def test_a_wrong_shape_is_a_users_mistake(text: str) -> None:
    with pytest.raises(LsmConfigError, match="B,T,H,K,V"):
        bench.parse_shape(text)


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("lsmc")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    result = subprocess.run([command, "list"], capture_output=True, text=True, timeout=60, check=True)
    assert zoo.names()[0] in result.stdout
