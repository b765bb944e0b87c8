"""A compiler for linear sequence models: declare one step, get chunk-parallel forward and backward code."""

__version__ = "0.1.0"
