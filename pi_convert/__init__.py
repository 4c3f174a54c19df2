"""pi-convert: export Position Interpolation checkpoints and prove what was written."""
