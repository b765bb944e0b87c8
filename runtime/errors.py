"""The mistakes that training, data, checkpoints and meshes report: each says what, where, and a way out."""

from __future__ import annotations

from lsmc.errors import LsmError


class LsmConfigError(LsmError):
    """A configuration field holds a value that cannot work."""


class LsmDataError(LsmError):
    """Training text is missing, unreachable, damaged or too short."""


class LsmCheckpointError(LsmError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class LsmTrainingError(LsmError):
    """Training went astray: the loss is not a number."""


class LsmMeshError(LsmError, ValueError):
    """A mesh that cannot work, or something in a model that an axis of the mesh cannot split."""
