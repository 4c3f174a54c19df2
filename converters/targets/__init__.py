"""Targets: every format that a checkpoint can be written to."""
