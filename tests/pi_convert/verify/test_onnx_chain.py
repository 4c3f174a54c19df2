"""Right ONNX exports are proven: every precision, kind of RoPE and form of the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from converters.errors import UnsupportedError
from converters.sources import open_checkpoint
from converters.targets.onnx import PRECISIONS, GraphOptions, plan_onnx, write_onnx
from pi_convert.evaluate.texts import Document
from pi_convert.runtimes.ort import OrtOptions
from pi_convert.verify import Outcome, Status, Verdict, VerifyRequest, verify
from tests.pi_convert.verify.conftest import BLOCKS, QWEN2_BLOCKS, TINY, Export
from tests.tiny import Shape, write_tiny
from tests.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.usefixtures("few_tokens")

ONE_THREAD = OrtOptions(threads=1)
TEXT = tuple(
    Document(f"text {i}", f"{i}. RoPE turns pairs by position; 12 and 345.\n\n    x = 7\n" * 6)
    for i in range(12)
)
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}


def export_onnx(
    folder: Path,
    precision: str,
    *,
    scale: float = 8.0,
    shape: Shape = TINY,
    options: GraphOptions | None = None,
    **tiny: Any,
) -> Export:
    source = open_checkpoint(str(write_tiny(folder / "tiny", shape=shape, **tiny)))
    checkpoint = source.interpolate(scale)
    out = folder / "tiny-ONNX"
    write_onnx(checkpoint, [plan_onnx(checkpoint, precision)], out, options, threads=1)
    return Export(source, out / "onnx" / PRECISIONS[precision].file_name, scale)


def run(right: Export, path: Path | None = None, **options: Any) -> Verdict:
    request = VerifyRequest(
        path or right.path, right.source, right.scale, texts=TEXT, ort=ONE_THREAD, **options
    )
    return verify(request)


@pytest.mark.parametrize(
    ("precision", "architecture", "scale", "shape"),
    [
        ("fp32", "llama", 1.1, TINY),
        ("fp32", "qwen2", 2.2, QWEN2_BLOCKS),
        ("fp16", "llama", 3.0, TINY),
        ("fp16", "qwen2", 8.0, QWEN2_BLOCKS),
        ("int8", "llama", 2.2, BLOCKS),
        ("int8", "qwen2", 1.1, QWEN2_BLOCKS),
        ("int4", "llama", 8.0, BLOCKS),
        ("int4", "qwen2", 3.0, QWEN2_BLOCKS),
        ("int4", "llama", 1.0, BLOCKS),
    ],
)
def test_a_right_export_is_proven(
    precision: str, architecture: str, scale: float, shape: Shape, tmp_path: Path
) -> None:
    right = export_onnx(tmp_path, precision, scale=scale, shape=shape, architecture=architecture)
    verdict = run(right)
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()
    assert all(control.seen for link in verdict.links for control in link.controls)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("rope", "scale"), [(LLAMA3, 1.0), (LLAMA3, 2.0)], ids=["llama3", "PI over llama3"]
)
def test_llama3(rope: dict[str, Any], scale: float, precision: str, tmp_path: Path) -> None:
    right = export_onnx(tmp_path, precision, scale=scale, shape=BLOCKS, rope=rope)
    verdict = run(right)
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()


def test_a_portable_graph_is_proven(tmp_path: Path) -> None:
    verdict = run(export_onnx(tmp_path, "fp32", options=GraphOptions(portable=True)))
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()


def test_last_logits_cannot_be_verified_and_the_error_says_why(tmp_path: Path) -> None:
    right = export_onnx(tmp_path, "fp32", options=GraphOptions(last_logits=True))
    with pytest.raises(UnsupportedError, match="logits of the last token alone"):
        run(right)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_carried_over_from_a_gguf_are_proven(quantization: str, tmp_path: Path) -> None:
    import gguf

    folder = write_tiny(tmp_path / "m", shape=BLOCKS)
    path = write_tiny_gguf(
        tmp_path / "m.gguf", folder, quantization=gguf.GGMLQuantizationType[quantization]
    )
    source = open_checkpoint(str(path))
    checkpoint = source.interpolate(4.0)
    out = tmp_path / "m-ONNX"
    write_onnx(checkpoint, [plan_onnx(checkpoint, "int4")], out, threads=1)
    verdict = run(Export(source, out / "onnx" / "model_q4.onnx", 4.0))
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()
    weights = next(link for link in verdict.links if link.name.value == "weights")
    assert weights.status is Status.PASSED
