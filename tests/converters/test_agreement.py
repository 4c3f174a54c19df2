"""The self-check: kernels of which one expression is contracted are found out, and what follows."""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from converters.encodings import ENCODINGS, Encoding
from converters.errors import ConvertError
from converters.ggml import Floats, Raw, kernels, load_ggml, quantizer
from converters.ggml.kernels import INSTRUCTION_SETS, Agreement, Kernels, agrees, find_kernels
from tests.native import TYPES, compiled, load, loadable, weights

FUSED = """
#ifdef __AVX512F__
inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#else
inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif
// nearest(a * b), the product not rounded
inline Ints nearest_of(Floats a, Floats b) {
    return bits_as<Ints>(fused(a, b, floats(12582912.f))) - 0x4b400000;
}
inline int32_t nearest_of(float a, float b) {
    return bits_as<int32_t>(__builtin_fmaf(a, b, 12582912.f)) - 0x4b400000;
}
inline Floats nearest_of(Floats a, Floats b, int low, int high) {
    return to_floats(clamp(nearest_of(a, b), low, high));
}
"""


# Every sum of native/ as a compiler would contract it, and the types that it is part of. Only
# ``first + 0.1f * step`` is left out: constants, the same float either way with one exception.
CONTRACTED: Mapping[tuple[str, ...], Mapping[str, str]] = {
    ("q2_k", "q4_k", "q5_k"): {
        "sum_x += weight[i] * x[i];": "sum_x = fused(weight[i], x[i], sum_x);",
        "sum_l += weighted;": "sum_l = fused(weight[i], level[i], sum_l);",
        "sum_l2 += weighted * level[i];": "sum_l2 = fused(weighted, level[i], sum_l2);",
        "sum_xl += weighted * x[i];": "sum_xl = fused(weighted, x[i], sum_xl);",
        "sum_w * sum_l2 - sum_l * sum_l;": "fused(sum_w, sum_l2, -(sum_l * sum_l));",
        "(sum_w * sum_xl - sum_x * sum_l)": "fused(sum_w, sum_xl, -(sum_x * sum_l))",
        "(sum_l2 * sum_x - sum_l * sum_xl)": "fused(sum_l2, sum_x, -(sum_l * sum_xl))",
        "by * level + from - x[i];": "fused(by, level, from) - x[i];",
        "error += error_of(i, level[i], by, from);": """{
            const Floats off = by * level[i] + from - x[i];
            error = fused(weight[i], Absolute ? absolute(off) : off * off, error);
        }""",
        "best += error_of(i, level_of(i, inverse), scale, low);": """{
            const Floats off = scale * level_of(i, inverse) + low - x[i];
            best = fused(weight[i], Absolute ? absolute(off) : off * off, best);
        }""",
        "nearest_float(inverse * (x[i] - low),": "nearest_of(inverse, x[i] - low,",
    },
    ("q4_k", "q5_k"): {
        "sum += x[i] * x[i];": "sum = fused(x[i], x[i], sum);",
        "nearest(inverse * scales[j])": "nearest_of(inverse, scales[j])",
        "nearest(inverse_min * minimums[j])": "nearest_of(inverse_min, minimums[j])",
    },
    ("q2_k",): {
        "nearest(inverse * scale[j]) : 0": "nearest_of(inverse, scale[j]) : 0",
        "nearest(inverse_min * minimum[j])": "nearest_of(inverse_min, minimum[j])",
    },
    ("q6_k",): {
        "sum_xl += weighted[i] * level;": "sum_xl = fused(weighted[i], level, sum_xl);",
        "sum_l2 += weight[i] * level * level;": "sum_l2 = fused(weight[i] * level, level, sum_l2);",
        "(sum_xl * sum_xl > best * sum_l2)": "(fused(sum_xl, sum_xl, -(best * sum_l2)) > 0)",
        "nearest_float(inverse * x[i],": "nearest_of(inverse, x[i],",
        "min(127, nearest(inverse * scale[j]))": "min(127, nearest_of(inverse, scale[j]))",
    },
    ("q3_k",): {
        "sum_xl += weighted[i] * level[i];": "sum_xl = fused(weighted[i], level[i], sum_xl);",
        "sum_l2 += square[i] * level[i] * level[i];":
            "sum_l2 = fused(square[i] * level[i], level[i], sum_l2);",
        "sum_xl - weighted[i] * level[i];": "fused(-weighted[i], level[i], sum_xl);",
        "sum_l2 - square[i] * level[i] * level[i];":
            "fused(-square[i] * level[i], level[i], sum_l2);",
        "rest_xl += weighted[i] * other;": "rest_xl = fused(weighted[i], other, rest_xl);",
        "rest_l2 += square[i] * other * other;":
            "rest_l2 = fused(square[i] * other, other, rest_l2);",
        "clamp(nearest(inverse * x[i])": "clamp(nearest_of(inverse, x[i])",
        "rounded = nearest(inverse * scale[j])": "rounded = nearest_of(inverse, scale[j])",
    },
    ("iq4_nl", "iq4_xs"): {
        "sum_xq += weighted * x[i];": "sum_xq = fused(weighted, x[i], sum_xq);",
        "sum_q2 += weighted * level;": "sum_q2 = fused(weighted, level, sum_q2);",
        "(sum_xq * sum_xq > best * sum_q2)": "(fused(sum_xq, sum_xq, -(best * sum_q2)) > 0)",
    },
    ("iq4_xs",): {"clamp(nearest(inverse * scale[j])": "clamp(nearest_of(inverse, scale[j])"},
}  # fmt: skip
SINGLE = [(types, old, new) for types, edits in CONTRACTED.items() for old, new in edits.items()]


class Remembered:
    """ggml, asked once for what every check asks it."""

    @staticmethod
    @functools.cache
    def _checked(encoding: Encoding) -> Raw:
        return load_ggml().quantize(encoding, kernels.values_to_check(encoding))

    def quantize(self, encoding: Encoding, values: Floats) -> Raw:
        return self._checked(encoding)


@pytest.mark.slow
@pytest.mark.parametrize(("types", "old", "new"), SINGLE, ids=[old for _, old, _ in SINGLE])
def test_one_contracted_expression_is_found_out(
    types: tuple[str, ...], old: str, new: str, tmp_path: Path
) -> None:
    name, ggml = loadable()[0].instruction_set, load_ggml()
    place = "inline uint16_t to_half"  # in lanes.hpp
    edits = {place: FUSED + place, old: new}
    compiled(tmp_path / "bad", name, "-mfma", "-O1", edits=edits)
    bad = find_kernels(ggml, tmp_path / "bad")
    assert isinstance(bad, Kernels)
    for kind in types:
        assert not agrees(bad, Remembered(), ENCODINGS[kind]), kind


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_a_contracted_build_is_found_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(name)
    ggml = load_ggml()
    compiled(tmp_path / "bad", name, "-mfma", "-ffp-contract=fast")
    compiled(tmp_path / "good", name)
    bad, good = find_kernels(ggml, tmp_path / "bad"), find_kernels(ggml, tmp_path / "good")
    assert isinstance(bad, Kernels)
    assert isinstance(good, Kernels)
    for kind in TYPES:
        assert agrees(good, ggml, ENCODINGS[kind]), kind
        assert not agrees(bad, ggml, ENCODINGS[kind]), kind
    with caplog.at_level(logging.WARNING):
        asked = quantizer.Quantizer(ggml, "auto", bad, None, Agreement(bad, ggml, None))
        assert asked.kernels_of(ENCODINGS["q4_k"]) is None
    assert "do not agree" in caplog.text
    values = weights(600, 1)
    for kind in TYPES:
        right = ggml.quantize(ENCODINGS[kind], values)
        np.testing.assert_array_equal(asked.quantize(ENCODINGS[kind], values), right)
    native = quantizer.Quantizer(ggml, "native", bad, None, Agreement(bad, ggml, None))
    with pytest.raises(ConvertError, match="do not agree with this build of ggml for q4_k") as got:
        native.quantize(ENCODINGS["q4_k"], values)
    assert "reinstall" not in str(got.value.hint)


def test_agreement_is_kept_by_build_and_processor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = loadable()[0]
    ggml, cache = load_ggml(), tmp_path / "c" / "k.json"
    assert Agreement(built, ggml, cache)(ENCODINGS["q4_k"])
    assert cache.read_text() == '{"q4_k": true}'
    assert not caplog.records
    cache.write_text('{"q4_k": false, "q5_k": true}')
    read = Agreement(built, ggml, cache)
    for _ in range(2):
        assert not read(ENCODINGS["q4_k"])
        assert read(ENCODINGS["q5_k"])
    assert [record.getMessage()[:5] for record in caplog.records] == ["q4_k:"]  # once a process
    for damaged in ("{", "[]", '{"q4_k": 1}'):
        cache.write_text(damaged)
        assert Agreement(built, ggml, cache)(ENCODINGS["q4_k"])
    other = Path(shutil.copy(built.path, tmp_path))
    of_both = kernels.cache_file(Kernels(other, ctypes.CDLL(str(other)), ggml), ggml)
    assert of_both == kernels.cache_file(built, ggml)
    with other.open("ab") as file:
        file.write(b"another build")
    of_another = kernels.cache_file(Kernels(other, ctypes.CDLL(str(other)), ggml), ggml)
    assert of_another != of_both


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    built = loadable()[0]
    (tmp_path / "file").write_text("")
    assert Agreement(built, load_ggml(), tmp_path / "file" / "k.json")(ENCODINGS["q6_k"])
