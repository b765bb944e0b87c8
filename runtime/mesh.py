"""The mesh of a run: which axes torch's `DeviceMesh` has, what each splits, and the process group behind it.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "sp"))
    lsmc.compile(model, mesh=mesh)

`dp` splits the batch, `sp` the sequence, `tp` heads and widths. An axis is named in every error about it. Nothing here
holds a rank: graphs are the same on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lsmc.errors import here
from lsmc.runtime.errors import LsmMeshError

AXES = {"dp": "the batch", "sp": "the sequence", "tp": "heads and widths"}
"""Axis → what is split over it."""


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh: its name, how many ranks lie along it, and the name of their process group in graphs."""

    name: str
    size: int
    group: str

    def __str__(self) -> str:
        return f"{self.name}={self.size}"

    def share(self, size: int, what: str) -> int:
        """A rank's share of `size`; raises LsmMeshError where it cannot be dealt out evenly."""
        if size % self.size:
            raise LsmMeshError(f"{what} is {size}, which the {self.size} ranks of axis {self.name!r} cannot share evenly",
                               help=f"use a multiple of {self.size}, or another size of axis {self.name!r}")
        return size // self.size


def sizes(text: str, setting: str) -> dict[str, int]:
    """`"dp=2,sp=4"` → the sizes of the axes, in their order; raises LsmMeshError, which names the setting, for what is none."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in AXES or name in found or not size.isdecimal() or int(size) < 1:
            known = ", ".join(f"{axis} ({what})" for axis, what in AXES.items())
            raise LsmMeshError(f"{setting} = {text!r}: {part!r} is no axis with its size",
                               help=f"axes are {known}, written as dp=2,sp=4")
        found[name] = int(size)
    return found


def axes(mesh: Any) -> dict[str, Axis]:
    """The axes of a DeviceMesh with more than one rank, in its order.

    Raises LsmMeshError for what is no DeviceMesh, has axes without names, or an axis whose name nothing is split over.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise LsmMeshError(f"mesh={mesh!r} is no DeviceMesh", where=here(),
                           help='init_device_mesh("cuda", (2,), mesh_dim_names=("sp",)) makes one')
    known = ", ".join(f"{name!r} ({what})" for name, what in AXES.items())
    if mesh.mesh_dim_names is None:
        raise LsmMeshError("the axes of the mesh have no names", where=here(), help=f"mesh_dim_names are of {known}")
    for name in mesh.mesh_dim_names:
        if name not in AXES:
            raise LsmMeshError(f"the mesh has an axis {name!r}, over which nothing is split", where=here(),
                               help=f"axes are {known}")
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape))
    return {name: Axis(name, n, mesh.get_group(name).group_name) for name, n in sizes.items() if n > 1}


__all__ = ["AXES", "Axis", "axes", "sizes"]
