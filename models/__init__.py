"""Blocks, experts and hybrid models (imported as ``lsmc.models``)."""
