"""Who quantizes: pi-convert's kernels where they are the same to the byte, else ggml."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from converters.encodings import Encoding
from converters.errors import EnvironmentNotReadyError, UnsupportedError
from converters.ggml.kernels import Agreement, Kernels, cache_file, find_kernels
from converters.ggml.quantize import Floats, Ggml, Raw, load_ggml

Choice = Literal["auto", "native", "ggml"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
VARIABLE = "PI_CONVERT_QUANTIZER"
_HINT = "Leave --quantizer out, or reinstall pi-convert with a C++ compiler present."
_HINT_DISAGREES = (
    "Leave --quantizer out and ggml makes them, slower. One of the two was compiled to round"
    " otherwise, such as with FMA."
)


@dataclass(frozen=True, slots=True)
class Quantizer:
    """ggml's bytes. ``unavailable`` says why there are no kernels, None where there are."""

    ggml: Ggml
    choice: Choice = "auto"
    kernels: Kernels | None = None
    unavailable: str | None = None
    _agreement: Agreement | None = field(default=None, repr=False)

    def quantize(self, encoding: Encoding, values: Floats) -> Raw:
        """As ``Ggml.quantize``.

        Raises ``EnvironmentNotReadyError`` where native was chosen and the kernels do not agree.
        """
        kernels = self.kernels_of(encoding)
        if kernels is None:
            return self.ggml.quantize(encoding, values)
        return kernels.quantize(encoding, values).raw

    def kernels_of(self, encoding: Encoding) -> Kernels | None:
        """The kernels where they make ``encoding``, None where ggml does."""
        if self.kernels is None or self._agreement is None:
            return None
        if self._agreement(encoding):
            return self.kernels
        if self.choice == "native" and encoding in self.kernels.encodings:
            raise EnvironmentNotReadyError(
                f"the {self.kernels.instruction_set} kernels do not agree with this build of ggml"
                f" for {encoding.name}",
                hint=_HINT_DISAGREES,
            )
        return None


def load_quantizer(choice: Choice | None = None) -> Quantizer:
    """The quantizer of a run; ``choice`` None is the environment's ``PI_CONVERT_QUANTIZER``.

    Raises ``UnsupportedError`` for a value that is none, and ``EnvironmentNotReadyError`` for
    native where there are no kernels.
    """
    wanted = choice or os.environ.get(VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise UnsupportedError(
            f"{VARIABLE} is {wanted!r}", hint=f"Expected one of {', '.join(CHOICES)}."
        )
    return _load(wanted)


@functools.cache
def _load(choice: Choice) -> Quantizer:
    ggml = load_ggml()
    if choice == "ggml":
        return Quantizer(ggml, choice, unavailable="not asked for")
    found = find_kernels(ggml)
    if isinstance(found, str):
        if choice == "native":
            raise EnvironmentNotReadyError(f"no kernels: {found}", hint=_HINT)
        return Quantizer(ggml, choice, unavailable=found)
    agreement = Agreement(found, ggml, cache_file(found, ggml))
    return Quantizer(ggml, choice, found, None, agreement)
