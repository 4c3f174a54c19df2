"""What cannot run is refused before any work, and what a user should know is said."""

from __future__ import annotations

import dataclasses
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

from converters.checkpoint import Checkpoint
from converters.errors import EnvironmentNotReadyError, UnsupportedError
from converters.sources import open_checkpoint
from converters.targets.onnx import (
    PRECISIONS,
    GraphOptions,
    OnnxTarget,
    WeightOptions,
    plan_onnx,
    preflight,
)
from tests.converters.targets.onnx.decoders import FUSED, SHAPE, export, tiny
from tests.converters.targets.onnx.test_onnx_quantized import EVEN, quantized
from tests.tiny import ODD, WIDE, Shape

asking = sys.modules["converters.targets.onnx.preflight"]  # the package has a function of that name


def ask(checkpoint: Checkpoint, precision: str, **options: Any) -> tuple[str, ...]:
    device = options.pop("device", None)
    weights = options.pop("weights", None)
    plan = plan_onnx(checkpoint, precision, weights)
    return preflight(checkpoint, [plan], GraphOptions(**options), device)


@pytest.mark.parametrize("shape", [SHAPE, FUSED, ODD, WIDE], ids=["apart", "fused", "odd", "wide"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_runs_is_not_refused(tmp_path: Path, precision: str, shape: Shape) -> None:
    checkpoint = tiny(tmp_path / "m", shape=shape)
    assert not any("asked" in notice for notice in ask(checkpoint, precision))
    for weights in (WeightOptions(128), WeightOptions(asymmetric=True, embedding="int4")):
        ask(checkpoint, precision, weights=weights, device="cpu")
    assert ask(checkpoint, "fp32", portable=True) == ()


@pytest.mark.parametrize("head_dim", [12, 20, 100])
@pytest.mark.parametrize("device", [None, "cpu", "web"])
def test_a_shape_that_no_kernel_takes_is_refused_by_name(
    tmp_path: Path, head_dim: int, device: Any
) -> None:
    shape = Shape(64, 64, 2, heads=2, kv_heads=1, head_dim=head_dim, context=64)
    checkpoint = tiny(tmp_path / "m", shape=shape)
    with pytest.raises(UnsupportedError, match=r"head_size must be a multiple of 8") as error:
        ask(checkpoint, "fp32", device=device)
    assert "--portable" in error.value.hint
    assert not any("asked" in notice for notice in ask(checkpoint, "fp32", portable=True))


def test_the_skeleton_is_refused_where_the_whole_graph_is(tmp_path: Path) -> None:
    """The oracle of the question is the answer: ONNX Runtime on the file itself."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    for head_dim, takes in ((20, False), (24, True), (16, True)):
        shape = Shape(64, 64, 2, heads=2, kv_heads=1, head_dim=head_dim, context=64)
        checkpoint = tiny(tmp_path / f"m{head_dim}", shape=shape)
        path = export(checkpoint, tmp_path / f"o{head_dim}")
        runs = True
        try:
            session = onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])
            for feeds in asking._steps(session):
                session.run(None, feeds)
        except Exception:  # noqa: BLE001 - ONNX Runtime's own have no base class
            runs = False
        assert runs == takes
        if takes:
            ask(checkpoint, "fp32")
        else:
            with pytest.raises(UnsupportedError):
                ask(checkpoint, "fp32")


@pytest.mark.parametrize("shape", [SHAPE, ODD, EVEN, Shape(576, 1536, 1, 9, 3, 64)])
@pytest.mark.parametrize("weights", [WeightOptions(), WeightOptions(128, asymmetric=True)])
def test_the_skeleton_has_the_encodings_of_the_whole(
    tmp_path: Path, shape: Shape, weights: WeightOptions
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=shape)
    for precision in PRECISIONS:
        whole = plan_onnx(checkpoint, precision, weights).encodings
        small = plan_onnx(asking.skeleton(checkpoint), precision, weights).encodings
        assert small == {name: whole[name] for name in small}
        assert len([name for name in small if "layers.0" in name]) == 9


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_no_cuda", lambda: "no CUDA device here")


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_without_a_device_what_is_known_of_cuda_is_refused(tmp_path: Path, precision: str) -> None:
    """libonnxruntime_providers_cuda.so has no float32 attention of this kind."""
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    with pytest.raises(UnsupportedError, match=r"on cuda.*GroupQueryAttention") as error:
        ask(checkpoint, precision, device="cuda")
    assert "int4f16" in error.value.hint


@pytest.mark.usefixtures("no_cuda")
def test_without_a_device_nothing_is_claimed_of_the_rest(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    for precision, options in (("fp16", {}), ("int4f16", {}), ("fp32", {"portable": True})):
        *_, last = ask(checkpoint, precision, device="cuda", **options)
        assert last == "no CUDA device here: whether the graph can run on CUDA was not asked"


def test_the_installed_cuda_provider_has_the_attention_that_is_said() -> None:
    """Names of C++ classes stand in the library, instances of templates with their types."""
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.exists():
        pytest.skip("this build of ONNX Runtime has no CUDA provider")
    name = b"N11onnxruntime7contrib4cuda19GroupQueryAttentionI"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert data.find(name + b"NS_9MLFloat16ES3_EE") >= 0
        assert data.find(name + b"NS_8BFloat16ES3_EE") >= 0
        assert data.find(name + b"f") < 0
        assert data.find(b"N11onnxruntime4cuda9AttentionIfEE") >= 0  # what --portable uses
        for kind in (b"f", b"NS_9MLFloat16E"):
            assert data.find(b"N11onnxruntime7contrib4cuda11MatMulNBitsI" + kind) >= 0


def test_a_provider_that_does_not_come_up_is_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where CUDA's libraries are missing: ONNX Runtime falls back without an error."""
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    monkeypatch.setattr(asking, "_no_cuda", lambda: None)
    monkeypatch.setattr(asking, "_try", lambda *arguments: False)
    *_, last = ask(checkpoint, "fp16", device="cuda")
    assert "no working CUDAExecutionProvider here" in last
    with pytest.raises(UnsupportedError, match="GroupQueryAttention"):
        ask(checkpoint, "fp32", device="cuda")


def test_nodes_left_to_another_provider_are_seen(tmp_path: Path) -> None:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = export(tiny(tmp_path / "m", shape=FUSED), tmp_path / "o", "int4")
    session = onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])
    assert set(asking._strays(session, "CPUExecutionProvider")) == set()
    strays = set(asking._strays(session, "CUDAExecutionProvider"))
    assert {"GroupQueryAttention", "MatMulNBits", "Gather"} <= strays
    assert "ReduceSum" not in strays


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    said = "onnxruntime is not installed: whether it can run the graph was not asked"
    assert ask(checkpoint, "fp32") == (said,)
    assert said in ask(checkpoint, "fp32", device="web")
    with pytest.raises(EnvironmentNotReadyError, match="onnxruntime cannot be imported"):
        ask(checkpoint, "fp32", device="cpu")


def test_tables_too_large_for_memory_are_refused_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    large = dataclasses.replace(checkpoint, rope=checkpoint.rope.interpolate(2.0**18))
    plan = plan_onnx(large, "fp32")
    size = 2**18 * 4 * 64 * 32 * 4
    assert plan.places["cos_cache"][0].part.size_bytes * 2 == size  # two tables of half a head
    target = OnnxTarget(large, [plan], tmp_path / "o")
    monkeypatch.setattr(asking, "available_memory_bytes", lambda: 2 * size - 2**20)
    with pytest.raises(UnsupportedError, match=rf"67,108,864 positions take {size >> 20:,} MiB"):
        target.require_writable()
    monkeypatch.setattr(asking, "available_memory_bytes", lambda: 2 * size)
    target.require_writable()  # negative control


@pytest.mark.parametrize("precision", ["int8", "int4", "int4f16"])
def test_standard_operators_have_no_blocks(tmp_path: Path, precision: str) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    plan = plan_onnx(checkpoint, precision, WeightOptions(embedding="float"))
    target = OnnxTarget(checkpoint, [plan], tmp_path / "o", GraphOptions(portable=True))
    with pytest.raises(UnsupportedError, match="standard operators have no product with"):
        target.require_writable()


def test_what_a_browser_cannot_address_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "m", shape=FUSED)
    plan = dataclasses.replace(plan_onnx(checkpoint, "fp32"), data_bytes=2**32 + 1)
    with pytest.raises(UnsupportedError, match=r"4,096 MiB of weights"):
        preflight(checkpoint, [plan], GraphOptions(), "web")
    assert any("WebGPU" in notice for notice in ask(checkpoint, "fp16", device="web"))
    assert ask(checkpoint, "fp32", device="web") == ()


def test_a_notice_tells_what_is_kept_what_is_lost_and_what_rounding_costs(tmp_path: Path) -> None:
    checkpoint = quantized(tiny(tmp_path / "m", shape=EVEN), rest="q4_1", ends="q6_k")
    kept, again, rounding = ask(checkpoint, "int4")
    assert kept == "int4: 14 q4_1: the source's own blocks, not quantized again"
    assert again.startswith("int4: 2 q6_k -> q8_0: quantized already in the source")
    assert "0.5 %" in rounding
    assert "--accuracy-level 0" in rounding
    slow = ask(checkpoint, "int4", accuracy_level=0)[-1]
    assert "tens of times" in slow
    floats = tiny(tmp_path / "f", shape=EVEN)
    assert ask(floats, "int4", accuracy_level=0, weights=WeightOptions(embedding="int4",
               head="int4")) == ()  # fmt: skip


def test_the_default_model_is_asked_in_no_time(default_gguf: Path) -> None:
    """By a skeleton: the model itself is not read."""
    checkpoint = open_checkpoint(str(default_gguf)).interpolate(8)

    def unread(start: int, stop: int) -> Any:
        raise AssertionError("read")

    tensors = {n: dataclasses.replace(t, read_raw=unread) for n, t in checkpoint.tensors.items()}
    ask(dataclasses.replace(checkpoint, tensors=tensors), "int4", device="cpu")
