"""Errors that a person can act on.

    ConvertError                 what was wrong, and a hint that says what to do
    ├── SourceError              a checkpoint cannot be read or is not whole
    │   ├── RopeError            its RoPE settings are missing, contradictory or out of range
    │   ├── TensorError          its tensors are missing, unexpected, wrongly shaped or not finite
    │   └── TokenizerError       its tokenizer is missing, not recognised or does not fit
    ├── UnsupportedError         understood, and refused by name
    ├── OutputError              the output cannot be written, or was found wrong after writing
    └── EnvironmentNotReadyError a library or device is missing or of the wrong build

Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations


class ConvertError(Exception):
    """One clear error: ``message`` says what was wrong, ``hint`` what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class SourceError(ConvertError):
    """A checkpoint cannot be read or is not whole."""


class RopeError(SourceError):
    """The RoPE settings are missing, contradictory or out of range."""


class TensorError(SourceError):
    """Tensors are missing, unexpected, wrongly shaped or not finite."""


class TokenizerError(SourceError):
    """The tokenizer is missing, not recognised or does not fit the embedding."""


class UnsupportedError(ConvertError):
    """Understood, and refused by name."""


class OutputError(ConvertError):
    """The output cannot be written, or was found wrong after writing."""


class EnvironmentNotReadyError(ConvertError):
    """A library or device is missing or of the wrong build."""
