"""The mistakes that training, data and checkpoints report: each says what, where, and a way out."""

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
