"""Checkpoints: a folder ``step-00000123`` of safetensors and JSON that is either complete or absent.

Everything is written into a temporary folder beside it, flushed to disk, and renamed. ``model.safetensors``
holds the parameters under their names, ``training.safetensors`` the optimizer's moments and the generators'
states, and ``state.json`` the step, the run's configuration and the sha256 of both files.

Tensors are whole in the files, also where ranks of a mesh hold parts of them: a run goes on over any mesh, or none. What is too
large for one process to write, ``torch.distributed.checkpoint`` writes from all: :class:`Portable`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lsmc.runtime.errors import LsmCheckpointError
from lsmc.runtime.plans.parts import Part, dealt, joined, parts_of, plain

FORMAT = 1
_FILES = ("model.safetensors", "training.safetensors")


@dataclass
class State:
    """What a run needs, besides parameters, optimizer and generators, to go on as if it had never stopped."""

    step: int
    elapsed: float
    """Seconds of training so far."""
    config: dict[str, Any]
    """The run's configuration, as JSON."""
    data: str
    """Fingerprint of the corpus."""
    model: dict[str, Any]
    """The model's configuration, as JSON."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: plain(name) for name, parameter in model.named_parameters()}


Held = tuple[Tensor, Part | None]
"""What a rank has of a tensor, and how that becomes the whole."""


def _parameters(model: nn.Module) -> dict[str, Held]:
    """Parameters and buffers under their names."""
    parts = parts_of(model)
    return {plain(n): (x.detach(), parts.get(plain(n))) for n, x in model.state_dict().items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Held]:
    """The optimizer's state as ``optimizer.<moment>.<parameter>``."""
    names, parts = _names(model), parts_of(model)
    return {
        f"optimizer.{key}.{names[parameter]}": (
            torch.as_tensor(value),
            parts.get(names[parameter]) if getattr(value, "shape", None) == parameter.shape else None,
        )
        for parameter, state in sorted(optimizer.state.items(), key=lambda entry: names[entry[0]])
        for key, value in state.items()
    }


def model_tensors(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers, whole, under their names; on ranks that only help to join them, with `keep` false, none."""
    return _whole(_parameters(model), keep)


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, Tensor]:
    """The optimizer's state as ``optimizer.<moment>.<parameter>``, whole; `keep` as for :func:`model_tensors`."""
    return _whole(_moments(model, optimizer), keep)


def _whole(tensors: dict[str, Held], keep: bool) -> dict[str, Tensor]:
    whole = {}
    for name, (x, part) in tensors.items():
        made = joined(x, part)
        if keep:
            whole[name] = made.cpu().contiguous()
    return whole


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`."""
    parameters, parts = {name: parameter for parameter, name in _names(model).items()}, parts_of(model)
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            target = parameters[parameter]
            # Step counts too: a fused optimizer keeps them beside the parameter.
            value = tensor.to(target.device).clone()
            moment = value.ndim > 0 or target.ndim == 0
            optimizer.state[target][key] = dealt(value, target, parts.get(parameter)) if moment else value


class Portable:
    """A model and its optimizer for ``torch.distributed.checkpoint``, on any mesh::

        dcp.save({"run": Portable(model, optimizer, mesh)}, checkpoint_id=folder)
        dcp.load({"run": Portable(model, optimizer, other_mesh)}, checkpoint_id=folder)

    Every rank writes and reads an equal share: whatever it holds of a tensor, the whole is cut along its first dimension over
    all ranks, tensor by tensor. ``mesh`` is that of all ranks; None for one process, which reads what many wrote.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, mesh: DeviceMesh | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.ranks = None if mesh is None else init_device_mesh(mesh.device_type, (mesh.size(),))

    def _held(self) -> dict[str, Held]:
        if self.optimizer is None:
            return _parameters(self.model)
        if not self.optimizer.state:
            _begin(self.optimizer)
        return _parameters(self.model) | _moments(self.model, self.optimizer)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self._share(joined(x, part)) for name, (x, part) in self._held().items()}

    def _share(self, whole: Tensor) -> Tensor:
        if self.ranks is None:
            return whole
        cut = Shard(0) if whole.ndim else Replicate()
        return distribute_tensor(whole, self.ranks, [cut], src_data_rank=None).clone()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, (x, part) in self._held().items():
            found = state[name]
            x.copy_(dealt(found.full_tensor() if isinstance(found, DTensor) else found, x, part))


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Moments as they are before the first step, by one that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def generator_tensors() -> dict[str, Tensor]:
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"generator.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def load_generators(tensors: dict[str, Tensor]) -> None:
    if "generator.cpu" in tensors:
        torch.set_rng_state(tensors["generator.cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"generator.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"generator.cuda.{i}"], i)


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def latest(folder: Path) -> Path:
    """The newest complete checkpoint in ``folder``, or ``folder`` itself if it is one."""
    if (folder / "state.json").is_file():
        return folder
    for inner in (folder / "checkpoints", folder):
        if found := steps(inner):
            return found[-1]
    raise LsmCheckpointError(f"there is no checkpoint in {folder}")


def _discard(path: Path) -> None:
    """Delete a checkpoint so that no half of it ever looks whole."""
    doomed = path.with_name(f".writing-old-{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def save(
    folder: Path,
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    keep: int = 3,
    first: bool = True,
) -> Path:
    """Write ``folder/step-N`` atomically and delete all but the newest ``keep``.

    Ranks of a mesh call it together; the ``first`` of them writes.
    """
    tensors = model_tensors(model, first)
    training = generator_tensors()
    if optimizer is not None:
        training |= optimizer_tensors(model, optimizer, first)
    if not first:
        return folder / name(state.step)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    target = folder / name(state.step)
    writing = folder / f".writing-{target.name}-{os.getpid()}"
    writing.mkdir()
    for file, content in zip(_FILES, (tensors, training)):
        save_file({k: v.detach().cpu().contiguous() for k, v in content.items()}, writing / file)
    record = {"format": FORMAT, **dataclasses.asdict(state)}
    record["sha256"] = {file: _digest(writing / file) for file in _FILES}
    (writing / "state.json").write_text(json.dumps(record, indent=1))
    for path in (*(writing / file for file in _FILES), writing / "state.json", writing):
        _sync(path)
    if target.exists():
        _discard(target)
    os.rename(writing, target)
    _sync(folder)
    for old in steps(folder)[: -max(1, keep)]:
        _discard(old)
    return target


def read_state(path: Path) -> State:
    """``state.json`` of one checkpoint."""
    try:
        record = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise LsmCheckpointError(f"{path / 'state.json'}: {error}") from error
    if record.get("format") != FORMAT:
        raise LsmCheckpointError(
            f"{path / 'state.json'}: format {record.get('format')!r}, this reads {FORMAT}"
        )
    fields = [field.name for field in dataclasses.fields(State)]
    missing = [field for field in fields if field not in record]
    if missing:
        raise LsmCheckpointError(f"{path / 'state.json'}: no field {missing[0]!r}")
    for file, expected in record.get("sha256", {}).items():
        if not (path / file).is_file():
            raise LsmCheckpointError(f"{path}: {file} is missing")
        if _digest(path / file) != expected:
            raise LsmCheckpointError(f"{path / file}: damaged (its sha256 is not the one in state.json)")
    return State(**{field: record[field] for field in fields})


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """Put a checkpoint's parameters, and with an ``optimizer`` also its state and the generators', back."""
    state = read_state(path)
    try:
        tensors = load_file(path / _FILES[0])
        training = load_file(path / _FILES[1]) if optimizer is not None else {}
    except (OSError, SafetensorError) as error:
        raise LsmCheckpointError(f"{path}: {error}") from error
    own, parts = {plain(n): x for n, x in model.state_dict().items()}, parts_of(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "the checkpoint lacks" if name in own else "the model lacks"
        raise LsmCheckpointError(f"{path / _FILES[0]}: {where} {name}; it belongs to another configuration")
    values = {}
    for name, tensor in tensors.items():
        part = parts.get(name)
        shape = tuple(own[name].shape) if part is None else part.whole_shape(own[name])
        if tensor.shape != shape:
            raise LsmCheckpointError(
                f"{path / _FILES[0]}: {name} is {tuple(tensor.shape)}, the model's is {shape}"
            )
        values[name] = dealt(tensor, own[name], part)
    model.load_state_dict({name: values[plain(name)] for name in model.state_dict()})
    if optimizer is not None:
        load_optimizer(model, optimizer, training)
        load_generators(training)
    return state
