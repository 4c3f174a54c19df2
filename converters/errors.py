"""Errors that a person can act on.

    ConvertError                 what was wrong, and a hint that says what to do
    ├── SourceError              a checkpoint cannot be read or is not whole
    │   ├── RopeError            its RoPE settings are missing, contradictory or out of range
    │   ├── TensorError          its tensors are missing, unexpected, wrongly shaped or not finite
    │   └── TokenizerError       its tokenizer is missing, not recognised or does not fit
    ├── UnsupportedError         understood, and refused by name
    ├── OutputError              the output cannot be written, or was found wrong after writing
    ├── TrainingError            a fine-tuning run cannot go on
    └── EnvironmentNotReadyError a library or device is missing or of the wrong build

Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

_SHOWN_CHARACTERS = 120
_PERMISSIONS = "Check the permissions of it and of the folders above it."
_OS_HINTS: Mapping[int, str] = {
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOENT: "Check the path; something may have removed it meanwhile.",
    errno.ENOSPC: "Free some space.",
    errno.EIO: "Check the disk or the network file system that it is on.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096",
}


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


class TrainingError(ConvertError):
    """A fine-tuning run cannot go on."""


class EnvironmentNotReadyError(ConvertError):
    """A library or device is missing or of the wrong build."""


def shown(value: object) -> str:
    """A value from a file as one short line of a message, whatever it is."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def os_hint(error: OSError, otherwise: str) -> str:
    """What to do about an error of the system; ``otherwise`` where its number says too little."""
    return _OS_HINTS.get(error.errno or 0, otherwise)
