"""Link 2 of ONNX files: stored parts become weights again, and one wrong bit of any part shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.containers.onnx import OnnxFile, read_onnx_file
from converters.encodings import NBITS, Encoding, decode_f32
from converters.nbits import fingerprint, quantize_nbits
from converters.targets.onnx import WeightOptions, plan_onnx, write_onnx
from converters.tensor import Tensor
from pi_convert.verify.encode import encode
from pi_convert.verify.onnx_weights import parts_of, stored_weight
from pi_convert.verify.weights import Build, Match, compare_tensor
from tests.converters.targets.onnx.decoders import tiny
from tests.converters.targets.onnx.test_onnx_quantized import EVEN

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HERE, ELSEWHERE = Build(same=True), Build(same=False)
FORMS = pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", WeightOptions()),
        ("fp16", WeightOptions()),
        *(
            (precision, WeightOptions(size, asymmetric, embedding="int4"))
            for precision in ("int4", "int8f16")
            for size in (32, 128)
            for asymmetric in (False, True)
        ),
    ],
)


def written(folder: Path, precision: str, options: WeightOptions) -> tuple[Any, Any, OnnxFile]:
    """The checkpoint, the plan, and the file read again."""
    checkpoint = tiny(folder / "m", shape=EVEN)
    plan = plan_onnx(checkpoint, precision, options)
    write_onnx(checkpoint, [plan], folder / "o")
    return checkpoint, plan, read_onnx_file(folder / "o" / "onnx" / plan.precision.file_name)


def weight(file: OnnxFile, source: Tensor) -> Tensor:
    found = stored_weight(source.name, source.shape, parts_of(source.name, file.tensors))
    assert found is not None
    return found


@FORMS
def test_every_form_is_read_as_what_was_planned(
    tmp_path: Path, precision: str, options: WeightOptions
) -> None:
    checkpoint, plan, file = written(tmp_path, precision, options)
    for name, source in checkpoint.tensors.items():
        found = weight(file, source)
        assert found.encoding is plan.encodings[name]
        match = Match.EXACT if found.encoding.is_float else Match.REQUANTIZED
        assert compare_tensor(found, source, HERE).match is match
        raw = encode(source.read_f32(0, source.rows), found.encoding)
        np.testing.assert_array_equal(found.read_rows(0, found.rows), raw)
        if len(source.shape) == 2:
            np.testing.assert_array_equal(found.read_rows(1, 9), raw[1:9])


@FORMS
@pytest.mark.parametrize("name", [UP, EMBEDDING])
def test_one_bit_of_any_part_shows(
    tmp_path: Path, precision: str, options: WeightOptions, name: str
) -> None:
    checkpoint, _, file = written(tmp_path, precision, options)
    source = checkpoint.tensors[name]
    for part in parts_of(name, file.tensors).values():
        assert part.file is not None
        row = 3
        at = part.offset + row * part.row_bytes
        data = bytearray(part.file.read_bytes())
        data[at] ^= 0x10  # of a float32 scale, a bit that no float16 has
        part.file.write_bytes(data)
        result = compare_tensor(weight(file, source), source, HERE)
        assert (result.match, result.differing_rows, result.first_row) == (None, 1, row), part.name
        data[at] ^= 0x10
        part.file.write_bytes(data)
    assert compare_tensor(weight(file, source), source, HERE).match is not None


def as_tensor(source: Tensor, raw: Any, encoding: Encoding) -> Tensor:
    return Tensor(source.name, source.shape, encoding, lambda start, stop: raw[start:stop])


def with_one_code_rounded_otherwise(row: Any, values: Any, encoding: Encoding) -> Any:
    """The code whose change costs least: its value was about halfway between two."""
    codes = range(row.shape[1] - NBITS[encoding].bits * encoding.block_elements // 8, row.shape[1])
    candidates = np.repeat(row, len(codes), axis=0)
    candidates[np.arange(len(codes)), codes] ^= 1
    return candidates[np.square(decode_f32(candidates, encoding) - values).sum(axis=1).argmin()]


@pytest.mark.parametrize("encoding", NBITS, ids=lambda encoding: encoding.name)
def test_another_builds_blocks_are_judged_by_their_error(
    tmp_path: Path, encoding: Encoding
) -> None:
    """One that rounds one code otherwise is a build; a zeroed row is a fault."""
    source = tiny(tmp_path / "m", shape=EVEN).tensors[UP]
    values = source.read_f32(0, source.rows).copy()
    right = quantize_nbits(values, encoding)
    assert compare_tensor(as_tensor(source, right, encoding), source, ELSEWHERE).match is (
        Match.REQUANTIZED
    )
    nearly = right.copy()
    nearly[7] = with_one_code_rounded_otherwise(right[7:8], values[7:8], encoding)
    other = compare_tensor(as_tensor(source, nearly, encoding), source, ELSEWHERE)
    assert other.match is Match.OTHER_BUILD
    assert compare_tensor(as_tensor(source, nearly, encoding), source, HERE).match is None
    zeroed = right.copy()
    zeroed[7] = quantize_nbits(np.zeros_like(values[7:8]), encoding)
    fault = compare_tensor(as_tensor(source, zeroed, encoding), source, ELSEWHERE)
    assert fault.match is None
    assert fault.distance is not None


def test_the_quantizer_here_is_known_by_its_fingerprint() -> None:
    """Link 2 asks ONNX Runtime's own quantizer for it, the file records that of the target's."""
    assert fingerprint(encode) == fingerprint()


UNREADABLE = {
    "codes alone": lambda parts: parts.pop("_scales"),
    "a scale too few": lambda parts: parts.update(_scales=cut(parts["_scales"])),
    "scales of whole numbers": lambda parts: parts.update(
        _scales=typed(parts["_scales"], np.int32)
    ),
    "a zero point too many": lambda parts: parts.update(_zero_points=parts["_codes"]),
    "floats too": lambda parts: parts.update({"": parts["_scales"]}),
}


def cut(part: Any) -> Any:
    return type(part)(part.name, part.dtype, (part.shape[0], part.shape[1] - 1), part.file)


def typed(part: Any, dtype: Any) -> Any:
    return type(part)(part.name, np.dtype(dtype), part.shape, part.file)


@pytest.mark.parametrize("fault", UNREADABLE)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_parts_that_fit_no_form_are_no_weight(tmp_path: Path, asymmetric: bool, fault: str) -> None:
    options = WeightOptions(asymmetric=asymmetric)
    checkpoint, _, file = written(tmp_path, "int4", options)
    source = checkpoint.tensors[UP]
    parts = parts_of(UP, file.tensors)
    UNREADABLE[fault](parts)
    assert stored_weight(UP, source.shape, parts) is None
    assert stored_weight(UP, (source.shape[0] + 1, source.shape[1]), parts) is None
