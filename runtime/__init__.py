"""Training, data, checkpoints, benchmarks and the demo (imported as ``lsmc.runtime``)."""
