"""Operators fed by maps, as models have them, with and without absorption: for any declaration, by the roles of its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import lsmc
from lsmc import LSM
from lsmc.expr import inputs_of
from lsmc.inputs import parts
from lsmc.lowering import ops
from lsmc.lowering.absorb import absorb
from lsmc.models.blocks import describe
from lsmc.pipeline import Options, compile_plan
from tests.declarations import Drawn

Parameters = dict[str, Tensor]
Chain = Callable[[Tensor, Parameters], Tensor]

FREE: dict[str, Chain] = {
    "plain": lambda x, p: x,
    "silu": lambda x, p: F.silu(x),
    "elu + 1": lambda x, p: F.elu(x) + 1,
    "tanh of a multiple": lambda x, p: torch.tanh(0.5 * x),
    "relu": lambda x, p: 0.125 * x + x.relu(),
    "gelu": lambda x, p: F.gelu(x),
    "swish by hand": lambda x, p: x * torch.sigmoid(x),
    "clamped": lambda x, p: x.clamp(min=-0.75, max=0.5),
    "scaled and shifted per head": lambda x, p: x * p["a"].view(-1, *[1] * (x.dim() - 3)).exp() + 0.5,
    "of a flat view": lambda x, p: torch.sigmoid(x.flatten(2)).unflatten(2, x.shape[2:]),
}
"""Maps of values without a range."""

VECTORS: dict[str, Chain] = {
    "normalize": lambda x, p: F.normalize(x, dim=-1, eps=1e-6),
    "l2norm by hand": lambda x, p: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
    "norm": lambda x, p: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6),
    "norm without keepdim": lambda x, p: x / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-6)[..., None],
    "rms_norm": lambda x, p: F.rms_norm(x, (x.shape[-1],), p["w"], 1e-6),
    "softmax": lambda x, p: torch.softmax(x, -1),
    "silu, then normalize": lambda x, p: F.normalize(F.silu(x), dim=-1, eps=1e-6),
    "centred": lambda x, p: x - x.mean(-1, keepdim=True),
}
"""Maps over the last dimension."""

POSITIVE: dict[str, Chain] = {
    "sigmoid": lambda x, p: torch.sigmoid(x),
    "biased sigmoid": lambda x, p: (x + p["b"].view(-1, *[1] * (x.dim() - 3))).sigmoid(),
    "softmax": VECTORS["softmax"],
    "exp": lambda x, p: torch.exp(0.5 * x),
}

DECAYS: dict[str, Chain] = {
    "logsigmoid": lambda x, p: F.logsigmoid(x),
    "logsigmoid / 16": lambda x, p: F.logsigmoid(x) / 16,
    "softplus": lambda x, p: -F.softplus(x),
    "-exp(A) softplus(x + bias)": lambda x, p: -p["a"].exp().view(-1, *[1] * (x.dim() - 3)) * F.softplus(
        x + p["b"].view(-1, *[1] * (x.dim() - 3))),
    "log1p": lambda x, p: -torch.log1p(x.square()),
}
"""Maps to log decays."""


def role(op: LSM, symbol: Any) -> dict[str, Chain]:
    """The maps that an input may come from."""
    c = op.canonical
    if any(part is not None and symbol in inputs_of(part) for part in (c.decay_k, c.decay_v)):
        if next(i.sign for i in describe(op) if i.name == symbol.name) > 0:
            return {"softplus": lambda x, p: F.softplus(x), "square": lambda x, p: x.square()}
        return DECAYS if symbol.per == "token" else {"plain": lambda x, p: -x.square(), "-exp": lambda x, p: -x.exp()}
    if next(i.role for i in describe(op) if i.name == symbol.name) == "strength" and symbol.dims:  # a factor in a decay
        return {"sigmoid": POSITIVE["sigmoid"]}
    if symbol.per != "token":
        return {"plain": FREE["plain"], "exp": lambda x, p: torch.exp(x) / 4}
    if c.normalizer:
        return {n: f for n, f in POSITIVE.items() if symbol.dims or n != "softmax"}
    return {**FREE, **VECTORS} if symbol.dims else {n: f for n, f in POSITIVE.items() if n != "softmax"}


@dataclass(frozen=True)
class Fed:
    """A declaration (a method of the zoo by name, or drawn) whose inputs come from chains, picked by `picks`."""

    method: str | Drawn
    picks: tuple[int, ...]
    time: int = 20
    groups: int = 1
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def declaration(self) -> LSM:
        return self.method.declaration() if isinstance(self.method, Drawn) else getattr(lsmc.zoo, self.method)

    def chains(self) -> dict[str, str]:
        op = self.declaration()
        return {s.name: list(role(op, s))[i % len(role(op, s))] for s, i in zip(op.inputs, [*self.picks * 8])}

    def forward(self) -> Callable[..., Tensor]:
        op = self.declaration()
        chains = {s.name: role(op, s)[self.chains()[s.name]] for s in op.inputs}

        def run(raw: dict[str, Tensor], parameters: dict[str, Parameters]) -> Tensor:
            return op(**{n: chain(raw[n], parameters[n]) for n, chain in chains.items()}, scale=0.5)

        return run

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Parameters]]:
        op, generator = self.declaration(), torch.Generator().manual_seed(self.seed)
        sizes = {"B": 2, "T": self.time, "H": 2, "HV": 2 * self.groups, "K": 5, "V": 5 if op.canonical.square else 3}

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        raw = {s.name: draw(*(sizes[a] for a in parts(s, step=False))) for s in op.inputs}
        return raw, {s.name: {"a": draw(sizes[s.heads]), "b": draw(sizes[s.heads]),
                              "w": draw(*(sizes[d] for d in s.dims[-1:]))} for s in op.inputs}


def results(run: Callable[..., Tensor], raw: dict[str, Tensor], parameters: dict[str, Parameters]) -> dict[str, Tensor]:
    """The output, and the gradient of every value and parameter that it depends on."""
    o = run(raw, parameters)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    leaves = {**raw, **{f"{n}.{p}": x for n, table in parameters.items() for p, x in table.items()}}
    grads = torch.autograd.grad((o * weights).sum(), list(leaves.values()), allow_unused=True)
    return {"o": o.detach(), **{n: g for n, g in zip(leaves, grads) if g is not None}}


def anything(*_: object) -> None:
    """No objection, whatever it costs."""


def compiled(run: Callable[..., Tensor], said: list[str], target: str = "aten", **options: Any) -> Callable[..., Tensor]:
    """`run`, captured, with what feeds its operator absorbed, and the operator compiled for `target`; all else as it is."""

    def backend(module: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        said.extend(absorb(module, anything))
        for _, node in ops.in_graph(module):
            plan = ops.plan_of(str(node.args[3]))
            if target != "aten":  # Triton's interpreter cannot be captured itself
                plan = compile_plan(plan.canonical, Options(scale=plan.scale, chunk=plan.chunk, target=target))
            node.args = (*node.args[:3], ops.register(plan))
        module.recompile()
        return module

    return torch.compile(run, backend=backend, fullgraph=True, **options)


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """RMS of the difference over the RMS of what is wanted, or over 1e-3 of the largest where that cancels."""
    assert found.keys() == wanted.keys()
    rms = {n: float(x.double().square().mean().sqrt()) for n, x in wanted.items()}
    floor = 1e-3 * max(1.0, *rms.values())
    return {n: float((found[n].double() - x.double()).square().mean().sqrt()) / max(rms[n], floor)
            for n, x in wanted.items()}


def run(fed: Fed, target: str = "aten") -> tuple[dict[str, float], list[str]]:
    """The errors of absorption against the maps and then the operator in float64, and what the pass said."""
    torch._dynamo.reset()
    os.environ["LSMC_BACKEND"] = "aten"  # for what is captured, and for what is wanted
    said: list[str] = []
    raw, parameters = fed.tensors()
    found = results(compiled(fed.forward(), said, target), raw, parameters)
    exact = {n: x.detach().double().requires_grad_() for n, x in raw.items()}
    same = {n: {p: x.detach().double().requires_grad_() for p, x in table.items()} for n, table in parameters.items()}
    return errors(found, results(fed.forward(), exact, same)), said
