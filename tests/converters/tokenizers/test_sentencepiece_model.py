from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import TokenizerError, UnsupportedError
from converters.tokenizers.sentencepiece_model import read_sentencepiece_model
from tests.converters.tokenizers.test_read_tokenizer import mistral_file


def proto(**changed: object) -> bytes:
    """A tiny model, written by protobuf itself."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto()
    for text, score, kind in (("<unk>", 0.0, 2), ("a", -1.0, 1), ("<0x00>", 0.0, 6)):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.bos_id = -1
    model.normalizer_spec.remove_extra_whitespaces = False
    for name, value in changed.items():
        spec = "trainer_spec" if hasattr(model.trainer_spec, name) else "normalizer_spec"
        setattr(getattr(model, spec), name, value)
    return bytes(model.SerializeToString())


def test_fields_and_defaults() -> None:
    model = read_sentencepiece_model(proto(), "here")
    assert model.tokens == ("<unk>", "a", "<0x00>")
    assert model.scores == (0.0, -1.0, 0.0)
    assert model.special_ids == {"unk": 0, "eos": 2}
    assert model.add_dummy_prefix is True
    assert read_sentencepiece_model(proto(add_dummy_prefix=False), "here").add_dummy_prefix is False


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": 1}, "unigram"),
        ({"model_type": 3}, "word"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"precompiled_charsmap": b"x"}, "precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"escape_whitespaces": False}, "escape_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_what_llama_cpp_cannot_reproduce_is_refused(changed: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        read_sentencepiece_model(proto(**changed), "here")


def test_a_cut_file_is_an_error() -> None:
    data = mistral_file("tokenizer.model.v1").read_bytes()
    for size in (0, 1, 100, 5000, len(data) - 1):
        with pytest.raises((TokenizerError, UnsupportedError)):
            read_sentencepiece_model(data[:size], "here")


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_model(data: bytes) -> None:
    with suppress(TokenizerError, UnsupportedError):
        assert read_sentencepiece_model(data, "here").tokens
