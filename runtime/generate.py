"""Text from a trained model: the prompt in one parallel pass, then token by token from the state.

The state of the LSM layers has a constant size; only attention layers keep their keys and values.
"""

from __future__ import annotations

import codecs
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsmc.runtime import checkpoint
from lsmc.runtime.data import ByteTokenizer, tokenizer
from lsmc.runtime.errors import LsmCheckpointError, LsmConfigError
from lsmc.runtime.train import pick_device


@dataclass(frozen=True)
class GenerateConfig:
    """What ``lsmc generate`` can be told."""

    run: Path = Path("runs/train")
    """Folder of a run, or one checkpoint of it."""
    prompt: str = "ROMEO.\n"
    tokens: int = 400
    """Tokens to generate."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int = 0
    """Choose among so many likeliest tokens; 0 for all."""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("tokens", 0), ("temperature", 0), ("top_k", 0)):
            if getattr(self, name) < least:
                raise LsmConfigError(f"GenerateConfig.{name} = {getattr(self, name)!r}: must not be negative")
        if not self.prompt:
            raise LsmConfigError("GenerateConfig.prompt is empty: at least one token is needed to start from")


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw a token from ``logits (B, vocabulary)``."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # On the host, so that a seed means the same text on every device.
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)


@torch.inference_mode()
def sample(
    model: Any, prompt: Tensor, tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[Tensor]:
    """Yield ``tokens`` new tokens ``(B,)`` after ``prompt (B, T)``, T ≥ 1."""
    generator = torch.Generator().manual_seed(seed)
    logits, state = model.prefill(prompt)
    logits = logits[:, -1]
    for index in range(tokens):
        token = choose(logits, temperature, top_k, generator)
        yield token
        if index + 1 < tokens:
            logits, state = model.step(token, state)


def load_model(run: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint and the configuration of its run."""
    path = checkpoint.latest(Path(run))
    state = checkpoint.read_state(path)
    models = importlib.import_module("lsmc.models")
    try:
        fields = dict(state.model)
        config = models.ModelConfig(**fields | {"moe": models.MoeConfig(**fields["moe"])})
    except (KeyError, TypeError) as error:
        raise LsmCheckpointError(
            f"{path / 'state.json'}: its model configuration does not fit: {error}"
        ) from error
    model = models.HybridMoE(config)
    checkpoint.load(path, model)
    return model.to(device).eval(), state.config


def generate(config: GenerateConfig, stream: bool = True) -> str:
    """The prompt and its continuation; ``stream`` also writes it to standard output as it comes."""
    device = pick_device(config.device)
    model, run = load_model(config.run, device)
    tokens = tokenizer(run.get("data", {}).get("tokenizer", "bytes"))
    prompt = torch.as_tensor(tokens.encode(config.prompt.encode()).copy(), dtype=torch.int64, device=device)
    out: list[int] = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    if stream:
        sys.stdout.write(config.prompt)
    for token in sample(model, prompt[None], config.tokens, config.temperature, config.top_k, config.seed):
        out.append(int(token))
        if stream and isinstance(tokens, ByteTokenizer):
            sys.stdout.write(decoder.decode(bytes([out[-1]])))
            sys.stdout.flush()
    text = tokens.decode(out)
    if stream:
        sys.stdout.write("\n" if isinstance(tokens, ByteTokenizer) else text + "\n")
    return config.prompt + text
