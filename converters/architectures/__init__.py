"""Architectures as data: one TOML each, read and validated by ``spec``."""

from converters.architectures.hparams import HParams
from converters.architectures.spec import (
    Architecture,
    TensorSpec,
    architecture_named,
    architecture_of_config,
    architectures,
)

__all__ = [
    "Architecture",
    "HParams",
    "TensorSpec",
    "architecture_named",
    "architecture_of_config",
    "architectures",
]
