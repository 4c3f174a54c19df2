"""``check`` and ``inspect`` of ONNX: right exports, and each finding on one broken by hand."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from converters.sources import open_checkpoint
from converters.targets.onnx import GraphOptions, plan_onnx, write_onnx
from pi_convert import cli
from pi_convert.audit import onnx_rules
from pi_convert.audit.findings import Severity
from pi_convert.audit.onnx_description import describe_onnx
from pi_convert.audit.onnx_rules import audit_onnx
from tests.pi_convert.verify.conftest import BLOCKS, QWEN2_BLOCKS, TINY
from tests.pi_convert.verify.onnx_tools import EditableOnnx, edit_onnx, frequencies
from tests.tiny import Shape, write_tiny

LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}


def export(
    folder: Path,
    *precisions: str,
    scale: float = 4.0,
    shape: Shape = BLOCKS,
    options: GraphOptions | None = None,
    **tiny: Any,
) -> Path:
    source = open_checkpoint(str(write_tiny(folder / "tiny", shape=shape, **tiny)))
    checkpoint = source.interpolate(scale)
    plans = [plan_onnx(checkpoint, name) for name in precisions]
    write_onnx(checkpoint, plans, folder / "tiny-ONNX", options, threads=1)
    return folder / "tiny-ONNX"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two graphs."""
    return export(tmp_path_factory.mktemp("two"), "fp32", "int4")


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "copy"))


def ids(path: Path, severity: Severity = Severity.WRONG) -> set[str]:
    return {finding.id for finding in audit_onnx(path).of(severity)}


@pytest.mark.parametrize(
    ("precisions", "options"),
    [
        (("fp32", "fp16", "int8", "int4"), {}),
        (("fp32",), {"architecture": "qwen2", "shape": QWEN2_BLOCKS, "scale": 2.2}),
        (("fp16",), {"shape": TINY, "scale": 1.1}),
        (("fp32",), {"options": GraphOptions(portable=True)}),
        (("fp32", "fp16"), {"rope": LLAMA3, "scale": 1.0}),
        (("fp32", "int4"), {"rope": LLAMA3, "scale": 2.0}),
        (("fp32",), {"scale": 1.0}),
    ],
)
def test_right_exports_have_nothing_wrong_and_nothing_to_note(
    precisions: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = export(tmp_path, *precisions, **options)
    audit = audit_onnx(folder)
    assert audit.is_right
    shape: Shape = options.get("shape", BLOCKS)
    usual = shape.heads * shape.head_dim == shape.hidden
    assert {f.id for f in audit.of(Severity.NOTE)} == (set() if usual else {"clients.optimum"})
    assert audit.architecture == options.get("architecture", "llama")
    assert {f.id for f in audit.findings} >= {"graph.valid", "data.whole", "rope.scaling"}
    assert cli.run(["check", str(folder)]) == 0


def cut(folder: Path) -> None:
    data = folder / "onnx" / "model_q4.onnx_data"
    data.write_bytes(data.read_bytes()[: -(1 << 16)])


def lost(folder: Path) -> None:
    (folder / "onnx" / "model_q4.onnx_data").unlink()


def flipped(folder: Path) -> None:
    """Another model's weights in a file of the same size."""
    data = folder / "onnx" / "model.onnx_data"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)


def config_without_scaling(folder: Path) -> None:
    """What onnxruntime-genai's builder does, the other way round: tables and config disagree."""
    edit_json(
        folder / "config.json", lambda c: [c.pop(k) for k in ("rope_scaling", "rope_parameters")]
    )


def shorter_genai(folder: Path) -> None:
    edit_json(folder / "genai_config.json", lambda c: c["model"].update(context_length=128))


def genai_file(folder: Path) -> None:
    edit_json(
        folder / "genai_config.json", lambda c: c["model"]["decoder"].update(filename="x.onnx")
    )


def genai_names(folder: Path) -> None:
    edit_json(
        folder / "genai_config.json",
        lambda c: c["model"]["decoder"]["inputs"].update(past_key_names="past.%d.key"),
    )


def genai_sizes(folder: Path) -> None:
    edit_json(folder / "genai_config.json", lambda c: c["model"]["decoder"].update(head_size=32))


def genai_without_decoder(folder: Path) -> None:
    edit_json(folder / "genai_config.json", lambda c: c["model"].pop("decoder"))


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def string_factor(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for key in ("rope_scaling", "rope_parameters"):
            config[key]["factor"] = "4"

    edit_json(folder / "config.json", change)


def no_onnx(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_bytes(b"not a graph" * 50)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (cut, "file.readable"),
        (lost, "file.readable"),
        (no_onnx, "file.readable"),
        (flipped, "data.swapped"),
        (config_without_scaling, "rope.tables.config"),
        (string_factor, "rope.config"),
        (damaged_config, "folder.readable"),
        (shorter_genai, "clients.genai.context"),
        (genai_without_decoder, "clients.genai"),
        (genai_file, "clients.genai.file"),
        (genai_names, "clients.genai.names"),
        (genai_sizes, "clients.genai.sizes"),
    ],
)
def test_what_is_wrong_is_found(
    damage: Callable[[Path], None], finding: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not ids(copy)
    damage(copy)
    assert finding in ids(copy)
    assert cli.run(["check", str(copy)]) == 3
    assert finding in capsys.readouterr().out


def test_swapped_data_of_two_exports_is_found(tmp_path: Path) -> None:
    """The same sizes everywhere; only the weights are another seed's."""
    a = export(tmp_path / "a", "fp32", seed=1)
    b = export(tmp_path / "b", "fp32", seed=2)
    data = Path("onnx", "model.onnx_data")
    assert (a / data).stat().st_size == (b / data).stat().st_size
    shutil.copy(b / data, a / data)
    assert ids(a) == {"data.swapped"}
    assert not ids(b)


def halve(file: EditableOnnx) -> None:
    record = file.record()
    columns = file.get("cos_cache").shape[1]
    file.set_tables(frequencies(record["theta"], record["factor"] / 2, columns))


def drop(file: EditableOnnx) -> None:
    record = file.record()
    file.set_tables(frequencies(record["theta"], 1.0, file.get("cos_cache").shape[1]))


def another_theta(file: EditableOnnx) -> None:
    record = file.record()
    columns = file.get("cos_cache").shape[1]
    file.set_tables(frequencies(record["theta"] * 2, record["factor"], columns))


def short(file: EditableOnnx) -> None:
    for name in ("cos_cache", "sin_cache"):
        file.set(name, file.get(name)[:-1])


def off_circle(file: EditableOnnx) -> None:
    table = file.get("sin_cache")
    table[7] *= 1.01
    file.set("sin_cache", table)


def recorded(file: EditableOnnx) -> None:
    file.set_record(factor=3.0)


@pytest.mark.parametrize(
    ("change", "finding", "says"),
    [
        (halve, "rope.tables.config", "the tables are of factor 2"),
        (drop, "rope.tables.config", "factor 1: the scaling was dropped"),
        (another_theta, "rope.tables.config", "other frequencies"),
        (short, "rope.tables.short", "the tables have 511 positions"),
        (off_circle, "rope.tables.circle", "cos^2 + sin^2 is off"),
        (recorded, "rope.record", "the graph records factor 3"),
    ],
)
def test_wrong_tables_are_found_and_named(
    change: Callable[[EditableOnnx], None], finding: str, says: str, two: Path, tmp_path: Path
) -> None:
    graph = edit_onnx(two / "onnx" / "model.onnx", tmp_path / "w", change)
    audit = audit_onnx(graph)
    found = next(f for f in audit.of(Severity.WRONG) if f.id == finding)
    assert says in found.found
    if finding in ("rope.tables.config", "rope.tables.circle"):
        both = audit_onnx(tmp_path / "w")
        assert "folder.one-model" in {f.id for f in both.of(Severity.WRONG)} or change is off_circle


def plain_attention(file: EditableOnnx) -> None:
    """Rows fed as they are: no ArgMax over the mask."""
    for node in file.model.graph.node:
        if node.op_type == "ArgMax":
            node.op_type = "ReduceMax"


def symbolic(file: EditableOnnx) -> None:
    for value in file.model.graph.input:
        if value.name.startswith("past_"):
            value.type.tensor_type.shape.dim[3].dim_param = "head_dim"


def unannounced(file: EditableOnnx) -> None:
    del file.files["config.json"]["transformers.js_config"]


def no_tokenizer(file: EditableOnnx) -> None:
    file.removed.add("tokenizer.json")


def unrecorded(file: EditableOnnx) -> None:
    file.remove_property("pi_convert.data.sha256")


def no_tables(file: EditableOnnx) -> None:
    """Angles computed in the graph, as an exporter by tracing leaves them."""
    table = next(t for t in file.model.graph.initializer if t.name == "cos_cache")
    table.name = "cos_of_angles"
    file.model.graph.node.insert(
        0, onnx.helper.make_node("Identity", ["cos_of_angles"], ["cos_cache"])
    )


def no_config(file: EditableOnnx) -> None:
    file.removed.add("config.json")


def no_mask(file: EditableOnnx) -> None:
    for value in file.model.graph.input:
        if value.name == "attention_mask":
            value.name = "mask"
    for node in file.model.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]


def foreign_operator(file: EditableOnnx) -> None:
    for node in file.nodes("RMSNormalization"):
        node.op_type = "SimplifiedLayerNormalization"


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (unrecorded, "data.unseen"),
        (no_tables, "rope.tables.unseen"),
        (no_config, "rope.config.missing"),
        (no_mask, "clients.inputs"),
        (foreign_operator, "graph.operators"),
        (plain_attention, "padding.left"),
        (symbolic, "clients.head-dim"),
        (unannounced, "clients.transformers-js"),
        (no_tokenizer, "clients.tokenizer"),
    ],
)
def test_what_a_client_would_miss_is_noted(
    change: Callable[[EditableOnnx], None], finding: str, two: Path, tmp_path: Path
) -> None:
    graph = edit_onnx(two / "onnx" / "model.onnx", tmp_path / "w", change)
    assert finding in ids(graph, Severity.NOTE)


def test_what_a_file_is_not_for_is_noted(tmp_path: Path) -> None:
    """Generation alone; and a head size that optimum does not compute."""
    last = export(tmp_path / "a", "fp32", options=GraphOptions(last_logits=True))
    assert ids(last, Severity.NOTE) == {"logits.last", "clients.optimum"}
    assert "logits of the last token alone" in describe_onnx(last).notes
    apart = Shape(hidden=96, intermediate=160, layers=2, heads=6, kv_heads=2, head_dim=32)
    wide = export(tmp_path / "b", "fp32", shape=apart)
    assert ids(wide, Severity.NOTE) == {"clients.optimum"}
    assert "logits of every token" in describe_onnx(wide).notes


@pytest.mark.parametrize("tied", [False, True])
def test_inspect_counts_embeddings_of_blocks(tied: bool, tmp_path: Path) -> None:
    folder = export(tmp_path, "int4", tied=tied)
    description = describe_onnx(folder)
    assert description.parameters == open_checkpoint(str(tmp_path / "tiny")).parameters
    assert {group.encoding for group in description.tensors} == {
        "int4 in blocks of 32", "int8 in blocks of 32", "float32"
    }  # fmt: skip


def test_a_data_file_of_another_name_or_with_bytes_over_is_noted(
    two: Path, copy: Path, tmp_path: Path
) -> None:
    graph = edit_onnx(two / "onnx" / "model.onnx", tmp_path / "w", unrecorded)
    data = graph.with_name("model.onnx_data")
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size + (2 << 20))
    assert ids(graph, Severity.NOTE) >= {"data.longer", "data.unseen"}
    model = onnx.load(str(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "weights.bin"
    data.rename(graph.with_name("weights.bin"))
    onnx.save_model(model, str(graph))
    assert "clients.data-name" in ids(graph, Severity.NOTE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../model.onnx_data"),
        ("location", "/etc/passwd"),
        ("location", "nowhere"),
        ("offset", "-4096"),
        ("offset", str(2**62)),
        ("offset", "many"),
        ("length", "3"),
        ("length", str(2**63)),
    ],
)
def test_lying_places_of_weights_are_findings_and_no_crash(
    key: str, value: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "onnx" / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    stored = next(t for t in model.graph.initializer if t.external_data)
    for entry in stored.external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(model.SerializeToString())
    assert "file.readable" in ids(copy)
    assert cli.run(["inspect", str(path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_inspect_shows_the_factor_that_acts(two: Path, tmp_path: Path) -> None:
    description = describe_onnx(two)
    rope = description.rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.theta, rope.rotary_dim) == ("linear", 4.0, 10000.0, 64)
    assert (rope.original_context, rope.context) == (128, 512)
    # 3 layers, keys and values of 2 heads of 64, float32
    token_bytes = 3 * 2 * 2 * 64 * 4
    assert description.kv_cache_bytes == {n: n * token_bytes for n in (128, 512)}
    assert description.parameters == open_checkpoint(str(two.parent / "tiny")).parameters
    assert any(
        "model_q4.onnx" in note and "int4 in blocks of 32" in note for note in description.notes
    )
    halved = edit_onnx(two / "onnx" / "model.onnx", tmp_path / "h", halve)
    wrong = describe_onnx(halved).rope
    assert wrong is not None
    assert wrong.factor == pytest.approx(2.0, rel=1e-5)
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copy(two / "onnx" / name, alone / name)
    bare = describe_onnx(alone / "model.onnx").rope
    assert bare is not None
    assert (bare.theta, bare.context) == (10000.0, 512)
    assert bare.factor == pytest.approx(4.0, rel=1e-5)
    assert np.isclose(bare.attention_factor, 1.0)


def test_json(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(two), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["container"], shown["rope"]["factor"]) == ("onnx", 4.0)
    assert cli.run(["check", str(two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]


def test_every_finding_is_documented_and_tested() -> None:
    document = (Path(__file__).parents[3] / "docs" / "check.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `([a-z0-9.-]+)` \|", document.split("## ONNX")[1], re.M))
    calls = re.compile(r"(?:wrong|note)\(\s*\"([a-z0-9.-]+)\"")
    assert documented == set(calls.findall(inspect.getsource(onnx_rules)))
    here = Path(__file__).read_text("utf-8")
    assert {name for name in documented if f'"{name}"' not in here} == set()
