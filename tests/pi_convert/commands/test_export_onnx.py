"""``export --to onnx`` as its user meets it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import onnx
import pytest

from pi_convert import cli
from tests.tiny import ODD, Shape, write_tiny
from tests.tiny_gguf import write_tiny_gguf

EVEN = Shape(256, 512, 2, heads=4, kv_heads=2, head_dim=64, context=64)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "Tiny-Model", shape=EVEN)


def export(model: Path, out: Path, *more: str) -> int:
    return cli.run(["export", str(model), "--to", "onnx", "--scale", "8", "--out", str(out), *more])


def recorded(path: Path) -> dict[str, str]:
    model = onnx.load(path, load_external_data=False)
    return {entry.key.removeprefix("pi_convert."): entry.value for entry in model.metadata_props}


def test_what_a_person_reads(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export(model, tmp_path / "o", "--precision", "fp32", "--precision", "int4") == 0
    text = capfd.readouterr().out
    folder = tmp_path / "o" / "Tiny-Model-PI8-ONNX"
    assert f"wrote        {folder}/" in text
    assert "onnx/model_q4.onnx  q4_0 14, f32 5, q8_0 2; 512 positions" in text
    assert "note         int4: products round activations to 8 bits" in text
    for path in folder.rglob("*.onnx*"):
        if path.is_file():
            assert hashlib.sha256(path.read_bytes()).hexdigest() in text


def test_json_has_the_notices_and_the_sizes(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--precision", "fp16", "--precision", "int8", "--block-size", "128", "--json"]
    assert export(model, tmp_path, "--dry-run", *words) == 0
    plan = json.loads(capfd.readouterr().out)
    assert not (tmp_path / "Tiny-Model-PI8-ONNX").exists()
    assert export(model, tmp_path, *words) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["notices"] == plan["notices"]
    assert [notice.split(":")[0] for notice in document["notices"]] == ["fp16", "int8"]
    for planned in document["planned"]:
        assert Path(planned["path"] + "_data").stat().st_size == planned["size_bytes"]
    kinds = {planned["precision"]: planned["tensor_types"] for planned in document["planned"]}
    assert kinds == {"fp16": {"f16": 16, "f32": 5}, "int8": {"int8_b128": 16, "f32": 5}}
    (artifact,) = document["artifacts"]
    for name, digest in artifact["files"].items():
        data = (Path(artifact["path"]) / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest


def test_the_options_reach_the_file_and_its_record(model: Path, tmp_path: Path) -> None:
    words = [
        "--precision", "int4", "--block-size", "128", "--asymmetric", "--embedding", "float",
        "--head", "int4", "--accuracy-level", "1", "--last-logits",
    ]  # fmt: skip
    assert export(model, tmp_path, *words) == 0
    path = tmp_path / "Tiny-Model-PI8-ONNX" / "onnx" / "model_q4.onnx"
    found = recorded(path)
    assert json.loads(found["weights"]) == {
        "block_size": 128, "asymmetric": True, "embedding": "float", "head": "int4",
        "requantize": False,
    }  # fmt: skip
    assert json.loads(found["graph"]) == {
        "accuracy_level": 1, "last_logits": True, "portable": False,
    }  # fmt: skip
    nodes = onnx.load(path, load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    attributes = [{a.name: a.i for a in node.attribute} for node in products]
    assert len(products) == 15  # the head among them
    for attribute in attributes:
        assert (attribute["block_size"], attribute["bits"]) == (128, 4)
        assert attribute["accuracy_level"] == 1
    assert all(node.input[3] for node in products)  # zero points
    assert next(n for n in nodes if n.name == "/model/embed_tokens/Gather").op_type == "Gather"


WRONG_USE = {
    "ONNX options for another target": ["--to", "gguf", "--block-size", "32", "--head", "int4"],
    "blocks in a float file": ["--to", "onnx", "--precision", "fp16", "--asymmetric"],
    "an accuracy level in a float file": ["--to", "onnx", "--accuracy-level", "4"],
    "a block size that is none": ["--to", "onnx", "--precision", "int4", "--block-size", "64"],
    "a storage that is none": ["--to", "onnx", "--precision", "int4", "--head", "q6_k"],
    "nothing to requantize": ["--to", "onnx", "--allow-requantize"],
}


@pytest.mark.parametrize("words", WRONG_USE.values(), ids=WRONG_USE)
def test_wrong_use_is_exit_2(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code = cli.run(["export", str(model), "--scale", "8", "--out", str(tmp_path / "o"), *words])
    assert code == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "o").exists()


REFUSED: dict[str, tuple[Shape, list[str], str]] = {
    "no kernel for the device": (EVEN, ["--precision", "int4", "--for", "cuda"],
                                 "GroupQueryAttention"),
    "no kernel for the shape": (Shape(64, 64, 2, heads=2, kv_heads=1, head_dim=20), [],
                                "head_size must be a multiple of 8"),
    "blocks in standard operators": (EVEN, ["--precision", "int4", "--portable"],
                                     "standard operators have no product"),
    "tables too large": (ODD, ["--scale", "10000000"], "no runtime could load the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import converters.targets.onnx
    from converters.targets import stream

    asking = sys.modules[f"{converters.targets.onnx.__name__}.preflight"]
    monkeypatch.setattr(asking, "_no_cuda", lambda: "no CUDA device here")

    def work(*arguments: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(stream.Stream, "run", work)
    shape, words, said = REFUSED[name]
    folder = write_tiny(tmp_path / "m", shape=shape)
    assert export(folder, tmp_path / "o", *words, "--dry-run") == 1
    assert "would stop" in (text := capfd.readouterr().out)
    assert said in text
    assert export(folder, tmp_path / "o", *words, "--dry-run", "--json") == 1
    assert any(said in problem for problem in json.loads(capfd.readouterr().out)["obstacles"])
    assert export(folder, tmp_path / "o", *words) == 1
    assert said in capfd.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_quantized_source(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind = gguf.GGMLQuantizationType.Q5_0
    path = write_tiny_gguf(tmp_path / "Tiny-Q5_0.gguf", model, quantization=kind)
    words = ["--precision", "int4", "--json"]
    assert export(path, tmp_path / "o", *words) == 1
    assert "--allow-requantize" in capfd.readouterr().err
    assert not (tmp_path / "o").exists()
    assert export(path, tmp_path / "o", *words, "--allow-requantize") == 0
    (planned,) = (document := json.loads(capfd.readouterr().out))["planned"]
    assert planned["tensor_types"] == {"q4_0": 14, "q8_0": 2, "f32": 5}
    assert any("q5_0 -> q4_0" in notice for notice in document["notices"])


def test_a_precision_asked_for_twice_is_written_once(model: Path, tmp_path: Path) -> None:
    assert export(model, tmp_path, "--precision", "int4", "--precision", "int4") == 0
    assert len(list((tmp_path / "Tiny-Model-PI8-ONNX" / "onnx").iterdir())) == 2
