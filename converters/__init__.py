"""Checkpoint formats: sources, targets, and the one owner of RoPE."""
