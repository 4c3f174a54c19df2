"""A source's values in an artifact's encoding, by other people's code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.encodings import F32, Encoding
from converters.ggml import load_ggml


def encode(values: npt.NDArray[np.float32], encoding: Encoding) -> npt.NDArray[np.uint8]:
    """Rows of float32 values in an encoding, uint8 (rows, row_bytes).

    Float types are gguf-py's, block types libggml's. Raises ``UnsupportedError`` for a type that
    needs an importance matrix.
    """
    if encoding is F32:
        return np.ascontiguousarray(values).view(np.uint8)
    if encoding.is_float:
        import gguf

        data = gguf.quantize(values, gguf.GGMLQuantizationType(encoding.ggml_type))
        return np.ascontiguousarray(data).view(np.uint8).reshape(len(values), -1)
    return load_ggml().quantize(encoding, values)
