"""Block sizes against gguf-py's table, decoding against numpy and torch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from converters.encodings import BF16, ENCODINGS, F16, decode_f32, encoding_of_ggml_type
from converters.errors import UnsupportedError

NEWER = {"q2_0"}  # in ggml, not in gguf-py 0.19


@pytest.mark.parametrize(
    "encoding", [e for e in ENCODINGS.values() if e.name not in NEWER], ids=lambda e: e.name
)
def test_sizes_are_gguf_pys(encoding) -> None:
    kind = gguf.GGMLQuantizationType(encoding.ggml_type)
    elements, size = GGML_QUANT_SIZES[kind]
    assert kind.name.lower() == encoding.name
    assert encoding.block_elements == elements
    if encoding.name != "q8_1":  # gguf-py still has two float32 there; ggml has two float16
        assert encoding.block_bytes == size


def test_every_type_of_gguf_py_is_known() -> None:
    assert {k.value for k in gguf.GGMLQuantizationType} == {
        e.ggml_type for e in ENCODINGS.values() if e.name not in NEWER
    }


def test_floats_decode_exactly() -> None:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 100
    for encoding, dtype in ((F16, torch.float16), (BF16, torch.bfloat16)):
        stored = values.to(dtype)
        raw = stored.view(torch.int16).numpy().view(np.uint8)
        assert np.array_equal(decode_f32(raw, encoding), stored.float().numpy())


def test_a_row_that_fits_no_block_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="256"):
        ENCODINGS["q4_k"].row_bytes(100)
    with pytest.raises(UnsupportedError, match="99"):
        encoding_of_ggml_type(99)
