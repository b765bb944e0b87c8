"""From a scheduled chunk program to code that runs (imported as ``lsmc.lowering``)."""
