"""Training: AdamW, warm-up, cosine; a run that stops anywhere goes on bit for bit.

A step is a pure function of (parameters, optimizer state, generator states, step number): data order comes
from the step number, the learning rate from the step number, and all the rest is in the checkpoint. The one
exception is stated where it is made: with ``max_seconds`` the schedule and the threads also follow the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lsmc.runtime import checkpoint
from lsmc.runtime.data import Batches, Corpus, DataConfig, evaluation_batches, load, tokenizer
from lsmc.runtime.errors import LsmCheckpointError, LsmConfigError, LsmTrainingError
from lsmc.runtime.plans.parts import clip_gradients, keep_parts, plain
from lsmc.runtime.progress import Progress
from lsmc.runtime.ranks import Ranks
from lsmc.runtime.threads import Threads


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``lsmc train`` can be told."""

    model: str = "tiny"
    """Size of the model: tiny, a0.3b-2b, a1b-7b."""
    lsm: str = ""
    """Method of the 'L' layers: a name in the zoo or FILE.py:NAME; empty for the model's own."""
    pattern: str = ""
    """One letter a layer, L or N; empty for the model's own."""
    balance_loss: float | None = None
    """Coefficient of the router's load-balancing loss; none for the model's own."""
    z_loss: float | None = None
    """Coefficient of the router's z-loss; none for the model's own."""
    renormalise: bool | None = None
    """Divide the chosen experts' probabilities by their sum; none for the model's own."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""

    data: DataConfig = field(default_factory=DataConfig)
    out: Path = Path("runs/train")
    """Folder of the run: metrics.jsonl, checkpoints, report.html."""
    resume: bool = False
    """Continue the run in ``out`` from its newest checkpoint."""
    overwrite: bool = False
    """Delete what an earlier run left in ``out``."""

    batch: int = 16
    """Sequences a micro-batch."""
    length: int = 256
    """Tokens a sequence."""
    accumulate: int = 1
    """Micro-batches a step."""
    steps: int = 500
    max_seconds: float = 0.0
    """Stop after so many seconds of training and let the schedule follow the clock too (0: steps alone
    decide, and the run is reproducible)."""
    min_steps: int = 0
    """Steps that a run with ``max_seconds`` takes even when its time is over, as long as ``patience`` lasts."""
    patience: float = 0.0
    """Further seconds for ``min_steps``; the run then ends."""
    threads: int = 0
    """CPU threads; 0: as many as torch chooses, and where ``max_seconds`` decides, one or all by measured speed."""

    lr: float = 3e-3
    min_lr: float = 0.05
    """Final learning rate as a share of ``lr``."""
    warmup: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices; not on embeddings, norms, biases and per-head constants."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest gradient norm; 0 for no clipping."""

    eval_every: int = 100
    eval_tokens: int = 32_768
    """Held-out tokens of an evaluation on the way; the last one reads ``final_eval_tokens``."""
    final_eval_tokens: int = 0
    """0: the whole held-out text."""
    checkpoint_every: int = 250
    keep: int = 3
    """Checkpoints kept."""
    log_every: int = 10

    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    autocast: Literal["none", "bf16"] = "none"
    compile: bool = False
    """Train through ``lsmc.compile``."""
    mesh: str = ""
    """Axes of processes that torchrun started, such as ``dp=2,sp=2``: dp deals out the sequences of a
    batch, sp the tokens of a sequence, tp heads and widths. Compiles too. Settings keep their meaning: they
    are those of the whole run."""
    fsdp: bool = False
    """Deal out parameters, gradients and moments over the axis dp too (FSDP2)."""
    timeout: float = 600.0
    """Seconds after which a process of a mesh that waits for another ends, and names it."""

    def __post_init__(self) -> None:
        def need(condition: bool, name: str, rule: str) -> None:
            if not condition:
                raise LsmConfigError(f"TrainConfig.{name} = {getattr(self, name)!r}: {rule}")

        for name in (
            "batch",
            "length",
            "accumulate",
            "steps",
            "keep",
            "log_every",
            "eval_every",
            "checkpoint_every",
        ):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        for name in (
            "warmup",
            "weight_decay",
            "clip",
            "max_seconds",
            "min_steps",
            "patience",
            "threads",
            "eval_tokens",
            "final_eval_tokens",
            "seed",
        ):
            need(getattr(self, name) >= 0, name, "must not be negative")
        need("dp=" in self.mesh or not self.fsdp, "fsdp", "needs a mesh with an axis dp")
        need(self.timeout > 0, "timeout", "must be positive")
        need(self.lr > 0, "lr", "must be positive")
        need(0 <= self.min_lr <= 1, "min_lr", "is a share of lr, between 0 and 1")
        need(0 <= self.beta1 < 1, "beta1", "must lie in [0, 1)")
        need(0 <= self.beta2 < 1, "beta2", "must lie in [0, 1)")


# Changing one of these makes another run; anything else may change between a stop and a resume. The text is
# compared by its fingerprint: files may move.
_BINDING = (
    "model lsm pattern balance_loss z_loss renormalise batch length accumulate lr min_lr warmup weight_decay "
    "beta1 beta2 clip seed autocast"
).split()


@dataclass
class TrainResult:
    """What a run came to."""

    out: Path
    model: nn.Module
    step: int
    held_out: float
    """Bits a byte on held-out text; NaN when the run was interrupted before its evaluation."""
    seconds: float
    tokens_per_second: float
    checkpoint: Path
    interrupted: bool


def share_done(config: TrainConfig, step: int, elapsed: float = 0.0) -> float:
    """How much of a run lies behind it: 1 after ``steps``, or, where the clock decides too, after
    ``max_seconds`` and ``min_steps``, or after ``max_seconds + patience``. It never falls."""
    done = step / config.steps
    if config.max_seconds:
        by_clock = elapsed / config.max_seconds
        if config.min_steps:
            by_clock = min(by_clock, step / config.min_steps)
        done = max(done, by_clock, elapsed / (config.max_seconds + config.patience))
    return min(1.0, done)


def learning_rate(config: TrainConfig, step: int, elapsed: float = 0.0) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``min_lr · lr`` at the run's end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.max_seconds:
        done = share_done(config, step, elapsed)
    else:
        done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; embeddings, convolutions, norms, biases and constants do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    matrices = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        # Experts are stacks of matrices.
        (decayed if plain(name) in matrices or parameter.ndim == 3 else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def to_json(value: Any) -> Any:
    """A configuration as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    return str(getattr(value, "name", value))


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LsmConfigError(f"TrainConfig.device = {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LsmConfigError(f"TrainConfig.device = {name!r}: torch sees no CUDA device here")
    return device


def build_model(config: TrainConfig, vocabulary: int) -> nn.Module:
    """The model that a configuration names."""
    # Late: models stand above the runtime.
    models = importlib.import_module("lsmc.models")
    base = models.config(config.model)
    moe = {
        name: value
        for name in ("balance_loss", "z_loss", "renormalise")
        if (value := getattr(config, name)) is not None
    }
    sized = models.config(
        config.model,
        lsm=config.lsm or base.lsm,
        pattern=config.pattern or base.pattern,
        vocabulary=base.vocabulary if vocabulary <= base.vocabulary else vocabulary,
        activation_checkpointing=config.activation_checkpointing,
        moe=moe,
    )
    with pick_device(config.device):  # large models are filled where they will live
        return models.HybridMoE(sized)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C (or SIGTERM); the second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """One run: a model with the protocol of ``HybridMoE``, a corpus and a configuration."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, corpus: Corpus, ranks: Ranks | None = None
    ) -> None:
        self.config, self.corpus = config, corpus
        self.ranks = ranks or Ranks("", pick_device(config.device), config.timeout)
        self.device = self.ranks.device
        self.model = model.to(self.device)
        self.batches = Batches(corpus.train, config.batch, config.length, config.seed)
        if self.ranks.mesh is not None:
            self._check_evaluation()
            keep_parts(self.model, self.ranks.mesh, *(x.to(self.device) for x in self.batches.at(0)))
        self.forward: Any = self.model
        if config.compile or self.ranks.mesh is not None:
            self.forward = importlib.import_module("lsmc").compile(self.model, mesh=self.ranks.mesh)
        if config.fsdp:
            fully_shard(self.forward, mesh=self.ranks.mesh["dp"])
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.step, self.elapsed = 0, 0.0
        self.out = Path(config.out)
        self.metrics = self.out / "metrics.jsonl"
        self.bits = 1 / (math.log(2) * corpus.bytes_per_token)

    # Checkpoints

    def save(self) -> Path:
        state = checkpoint.State(
            step=self.step,
            elapsed=self.elapsed,
            config=to_json(self.config),
            data=self.corpus.fingerprint,
            model=to_json(getattr(self.model, "config", None)) or {},
        )
        self.ranks.at(f"the checkpoint of step {self.step}")
        folder, first = self.out / "checkpoints", self.ranks.first
        return checkpoint.save(folder, state, self.model, self.optimizer, self.config.keep, first)

    def resume(self) -> None:
        """Go on from the newest checkpoint; metrics written after it are dropped."""
        path = checkpoint.latest(self.out)
        state = checkpoint.read_state(path)
        mine = to_json(self.config)
        for name in _BINDING:
            if state.config.get(name) != mine[name]:
                raise LsmCheckpointError(
                    f"{path}: TrainConfig.{name} was {state.config.get(name)!r}, now it is {mine[name]!r}\n"
                    "help: resume with the same setting, or start another run with another --out"
                )
        if state.data != self.corpus.fingerprint:
            raise LsmCheckpointError(
                f"{path}: the text is not the one of this run ({self.corpus.description})"
            )
        checkpoint.load(path, self.model, self.optimizer)
        self.step, self.elapsed = state.step, state.elapsed
        if self.ranks.first and self.metrics.exists():
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            self.metrics.write_text("".join(line + "\n" for line in kept))

    # One step

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast == "bf16")

    def train_step(self) -> tuple[Any, Tensor]:
        """One optimizer step; ``(losses of the last micro-batch, gradient norm)``, still on the device."""
        config = self.config
        rate = learning_rate(config, self.step, self.elapsed)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for micro in range(config.accumulate):
            self.ranks.at(f"the batch of step {self.step + 1}")
            tokens, targets = self.batches.at(self.step * config.accumulate + micro)
            self.ranks.at(f"step {self.step + 1}")
            with self._autocast():
                losses = self.forward(tokens.to(self.device), targets.to(self.device))
            (losses.total / config.accumulate).backward()
        if self.ranks.mesh is not None:
            norm = clip_gradients(self.model, self.ranks.mesh, config.clip or math.inf)
        else:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses, norm

    @torch.no_grad()
    def evaluate(self, limit: int) -> float:
        """Bits a byte on held-out text, each window read from an empty memory."""
        self.model.eval()
        total, count = 0.0, 0
        model: Any = self.model if self.ranks.mesh is None else self.forward
        for tokens, targets in self._evaluation_batches(limit):
            self.ranks.at(f"the evaluation after step {self.step}")
            with self._autocast():
                losses = model(tokens.to(self.device), targets.to(self.device))
            total += losses.nll.item() * tokens.numel()
            count += tokens.numel()
        if isinstance(model, FSDPModule):
            model.reshard()
        self.model.train()
        return total / count * self.bits

    def _evaluation_batches(self, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        shares = self.ranks.sizes.get("dp", 1)
        return evaluation_batches(self.corpus.held_out, self.config.batch, self.config.length, limit, shares)

    def _check_evaluation(self) -> None:
        """Held-out text that ranks cannot share is reported now, and not after hours."""
        next(self._evaluation_batches(1))

    # The loop

    def _write(self, record: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _finished(self) -> bool:
        return share_done(self.config, self.step, self.elapsed) >= 1

    def run(self, progress: Progress) -> TrainResult:
        config = self.config
        started, first = time.perf_counter(), self.step
        before = self.elapsed
        tokens_a_step = config.batch * config.length * config.accumulate
        last_time, last_step = started, self.step
        held_out, paused = math.nan, 0.0
        saved: Path | None = None
        threads = Threads(config.threads, measure=bool(config.max_seconds) and self.device.type == "cpu")
        with _interruptible() as asked, threads, self.ranks.naming():
            stop = 0.0
            while not self._finished() and not stop:
                with threads.timed():
                    losses, norm = self.train_step()
                elapsed = before + time.perf_counter() - started - paused
                (self.elapsed,) = self.ranks.largest(elapsed)
                if self.step % config.log_every == 0 or self._finished():
                    nll = losses.nll.item()
                    if not math.isfinite(nll):
                        raise LsmTrainingError(
                            f"step {self.step}: the loss is {nll}\nhelp: a smaller --lr or a longer --warmup"
                        )
                    now = time.perf_counter()
                    rate = (self.step - last_step) * tokens_a_step / max(1e-9, now - last_time)
                    last_time, last_step = now, self.step
                    record = {
                        "step": self.step,
                        "elapsed": round(self.elapsed, 3),
                        "loss": losses.total.item(),
                        "bits_per_byte": nll * self.bits,
                        "balance": losses.balance.item(),
                        "z": losses.z.item(),
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "gradient_norm": norm.item(),
                        "tokens_per_second": rate,
                        "tokens": self.step * tokens_a_step,
                        "threads": threads.now,
                        "load": [[round(x, 4) for x in layer] for layer in losses.load.tolist()],
                    }
                    self._write(record)
                    progress.update(record, self._left(first, started + paused))
                pause = time.perf_counter()
                if self.step % config.eval_every == 0 and not self._finished():
                    held_out = self.evaluate(config.eval_tokens)
                    self._write({"step": self.step, "elapsed": round(self.elapsed, 3), "held_out": held_out})
                    progress.evaluated(self.step, held_out)
                if self.step % config.checkpoint_every == 0:
                    saved = self.save()
                paused += time.perf_counter() - pause
                last_time += time.perf_counter() - pause
                (stop,) = self.ranks.largest(float(asked.is_set()))
            interrupted = bool(stop) and not self._finished()
            if saved is None or saved.name != checkpoint.name(self.step):
                saved = self.save()
            if interrupted:
                progress.note(f"stopped at step {self.step}; saved {saved}; --resume goes on")
            else:
                held_out = self.evaluate(config.final_eval_tokens)
                self._write(
                    {
                        "step": self.step,
                        "elapsed": round(self.elapsed, 3),
                        "held_out": held_out,
                        "final": True,
                    }
                )
                progress.evaluated(self.step, held_out)
        seconds = self.elapsed - before
        speed = (self.step - first) * tokens_a_step / max(1e-9, seconds)
        return TrainResult(self.out, self.model, self.step, held_out, seconds, speed, saved, interrupted)

    def _left(self, first: int, started: float) -> float:
        """Seconds of training left, as things go."""
        spent = time.perf_counter() - started
        config, each = self.config, spent / max(1, self.step - first)
        left = each * (config.steps - self.step)
        if config.max_seconds:
            by_clock = max(config.max_seconds - self.elapsed, each * (config.min_steps - self.step))
            left = min(left, by_clock, config.max_seconds + config.patience - self.elapsed)
        return max(0.0, left)


def train(config: TrainConfig, model: nn.Module | None = None, quiet: bool = False) -> TrainResult:
    """Run (or resume) what ``config`` describes; metrics, checkpoints and ``report.html`` go into
    ``config.out``.

    ``model`` takes the place of the configured one: anything with the protocol of ``HybridMoE``. With
    ``config.mesh`` all its processes call this, and the first of them writes; ``out`` must be the same folder
    for all.
    """
    out = Path(config.out)
    ranks = Ranks(config.mesh, pick_device(config.device), config.timeout)
    if ranks.first and ((out / "metrics.jsonl").exists() or (out / "checkpoints").exists()):
        if config.overwrite and not config.resume:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            (out / "metrics.jsonl").unlink(missing_ok=True)
        elif not config.resume:
            raise LsmConfigError(
                f"TrainConfig.out = {str(out)!r} already holds a run\n"
                "help: --resume it, --overwrite it, or another --out"
            )
    if config.resume:
        checkpoint.latest(out)  # fails before any text is read
    corpus = load(config.data)
    torch.manual_seed(config.seed)
    if model is None:
        model = build_model(config, tokenizer(config.data.tokenizer).vocabulary)
    with ranks:
        trainer = Trainer(config, model, corpus, ranks)
        if config.resume:
            trainer.resume()
        if ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(to_json(config), indent=1))
        with Progress(0 if config.max_seconds else config.steps, quiet=quiet or not ranks.first) as progress:
            progress.note(corpus.description)
            progress.note(f"{len(corpus.train):,} tokens, {len(corpus.held_out):,} held out")
            result = trainer.run(progress)
    if ranks.first:
        from lsmc.runtime.report import write_report

        write_report(out)
    return result
