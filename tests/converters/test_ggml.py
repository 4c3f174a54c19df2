"""ggml through ctypes: its numbers against gguf-py's, its layout checked, its log put back."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from converters.encodings import ENCODINGS
from converters.errors import EnvironmentNotReadyError, UnsupportedError
from converters.ggml import Ggml, library, load_ggml
from converters.ggml import quantize as ggml_module
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf
from converters.targets.gguf import types as types_module
from converters.targets.gguf.types import FILE_TYPES
from tests.tiny import ODD, write_tiny

QUANTIZED_BY_BOTH = ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"]
DECODED_BY_BOTH = [
    *QUANTIZED_BY_BOTH, "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq3_s", "iq4_nl", "iq4_xs",
    "mxfp4",
]  # fmt: skip


def weights(rows: int = 6) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal((rows, 512)).astype(np.float32)


@pytest.mark.parametrize("name", QUANTIZED_BY_BOTH)
def test_quantizing_equals_gguf_py(name: str) -> None:
    encoding = ENCODINGS[name]
    expected = gguf.quantize(weights(), gguf.GGMLQuantizationType(encoding.ggml_type))
    found = load_ggml().quantize(encoding, weights())
    np.testing.assert_array_equal(found, np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize("name", DECODED_BY_BOTH)
def test_decoding_equals_gguf_py(name: str) -> None:
    encoding = ENCODINGS[name]
    raw = load_ggml().quantize(encoding, weights())
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(encoding.ggml_type))
    np.testing.assert_array_equal(load_ggml().dequantize(encoding, raw), expected)


def test_threads_make_the_same_bytes() -> None:
    ggml, values = load_ggml(), weights(64)
    expected = {name: ggml.quantize(ENCODINGS[name], values) for name in ("iq3_s", "q4_k", "q2_k")}
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            (n, pool.submit(ggml.quantize, ENCODINGS[n], values)) for n in expected for _ in "ab"
        ]
        for name, job in jobs:
            np.testing.assert_array_equal(job.result(), expected[name])


def test_a_type_that_needs_an_importance_matrix_never_aborts_the_process() -> None:
    with pytest.raises(UnsupportedError, match="iq2_xxs needs an importance matrix"):
        load_ggml().quantize(ENCODINGS["iq2_xxs"], weights())
    with pytest.raises(UnsupportedError, match="does not divide"):
        load_ggml().quantize(ENCODINGS["q4_k"], weights()[:, :320])


def test_an_infinite_scale_is_not_valid() -> None:
    encoding = ENCODINGS["q8_0"]
    raw = load_ggml().quantize(encoding, weights())
    assert load_ggml().is_valid(encoding, raw)
    raw[2, :2] = np.array([np.inf], np.float16).view(np.uint8)
    assert not load_ggml().is_valid(encoding, raw)


def test_the_fingerprint_tells_another_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml = load_ggml()
    assert ggml.fingerprint() == Ggml(ggml.libraries).fingerprint()
    assert len(ggml.fingerprint()) == 64
    other = Ggml(ggml.libraries)
    exact = other.quantize

    def contracted(encoding: Any, values: np.ndarray) -> np.ndarray:
        raw = exact(encoding, values)
        if encoding.name == "q6_k":
            raw[300, 7] ^= 1
        return raw

    monkeypatch.setattr(other, "quantize", contracted)
    assert other.fingerprint() != ggml.fingerprint()


def test_names_and_numbers_of_file_types_are_llama_cpps() -> None:
    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    theirs = {
        name.removeprefix(prefix).lower(): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        for prefix in prefixes
        if name.startswith(prefix)
    }
    known = {name: number for name, number in theirs.items() if name in FILE_TYPES}
    assert known == {name: FILE_TYPES[name] for name in known}
    assert theirs.keys() <= FILE_TYPES.keys()


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentNotReadyError) as missing:
        library.load_libraries.__wrapped__()
    assert "pip install" in missing.value.hint


def test_a_library_that_does_not_load_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / f"libggml-base.{library._SUFFIX}").write_bytes(b"not a library")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(library, "find_spec", lambda name: Spec)
    with pytest.raises(EnvironmentNotReadyError, match="libggml-base"):
        library.load_libraries.__wrapped__()


def test_another_layout_of_structs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_DEFAULT_BUFFER_BYTES", 1)
    with pytest.raises(EnvironmentNotReadyError, match="another layout"):
        library.load_libraries.__wrapped__()
    changed = {**ENCODINGS, "q4_0": ENCODINGS["q4_1"].__class__("q4_0", 2, 32, 20)}
    monkeypatch.setattr(ggml_module, "ENCODINGS", changed)
    with pytest.raises(EnvironmentNotReadyError, match="q4_0 has blocks of"):
        Ggml(load_ggml().libraries)


def test_a_log_that_is_not_understood_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(write_tiny(tmp_path / "m", shape=ODD)))
    whole = types_module._dry_run
    monkeypatch.setattr(
        types_module, "_dry_run", lambda *args: whole(*args).replace("blk.1.ffn_up", "other")
    )
    with pytest.raises(EnvironmentNotReadyError, match="named 21 of 21"):
        plan_gguf(checkpoint, ["q8_0"])


def test_the_log_goes_back_to_whom_it_went(tmp_path: Path) -> None:
    heard: list[bytes] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, user_data: object) -> None:
        heard.append(text)

    llama = load_ggml().libraries.llama
    llama.llama_log_set(ctypes.cast(listen, ctypes.c_void_p), None)
    try:
        plan_gguf(open_checkpoint(str(write_tiny(tmp_path / "m", shape=ODD))), ["q8_0"])
        assert heard == []
        found = ctypes.c_void_p()
        llama.llama_log_get(ctypes.byref(found), ctypes.byref(ctypes.c_void_p()))
        assert found.value == ctypes.cast(listen, ctypes.c_void_p).value
    finally:
        llama.llama_log_set(None, None)
