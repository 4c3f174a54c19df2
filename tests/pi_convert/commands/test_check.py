"""``check``: each fault has its finding, right files have none that is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFValueType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.containers.gguf import read_gguf_file
from converters.errors import ConvertError, SourceError
from converters.rope import Llama3Scaling, RopeParameters
from converters.rope.gguf import LLAMA3_RECORD, write_llama3_record
from pi_convert.audit import llamacpp
from pi_convert.audit.description import describe_gguf
from pi_convert.audit.findings import Severity
from pi_convert.audit.llamacpp import LOADED_TYPES
from pi_convert.audit.repair import plan_repair
from pi_convert.audit.rules import RULES, audit_path
from pi_convert.commands.check import command
from pi_convert.report.audit import audit_json, audit_text
from pi_convert.report.description import description_json, description_text
from tests.headers import (
    LINEAR,
    PLAIN,
    SIZES,
    SPM,
    TOKENIZER,
    VOCABULARY,
    tensors_of,
    write_header,
)

LLAMA3 = RopeParameters(
    10000.0, 16, 128, 128, llama3=Llama3Scaling(8.0, 1.0, 4.0, 8192)
).frequency_divisors()
ROPE_FREQS = {"rope_freqs.weight": LLAMA3}
ODD_LLAMA3 = RopeParameters(10000.0, 16, 128, 128, llama3=Llama3Scaling(5.3, 1.7, 3.1, 96))
RECORD = write_llama3_record(ODD_LLAMA3)
FACTOR_OF_IT = f"{LLAMA3_RECORD}.factor"
ODD_FREQS = {"rope_freqs.weight": ODD_LLAMA3.frequency_divisors()}
YARN = {**LINEAR, "rope.scaling.type": "yarn"}
PHI3: dict[str, Any] = {
    **PLAIN,
    "context_length": 1024,
    "rope.scaling.original_context_length": 128,
    "rope.scaling.attn_factor": 1.19,
}
PHI3_FACTORS = {f"rope_factors_{k}.weight": np.ones(8, np.float32) for k in ("long", "short")}
GEMMA3 = {
    **LINEAR,
    "rope.freq_base": 1e6,
    "attention.key_length": 32,
    "rope.dimension_count": None,
    "attention.sliding_window": 64,
}
OVER_LLAMA3 = {
    **LINEAR,
    "context_length": 131072 * 8,
    "rope.scaling.original_context_length": 131072,
}


def linear(**changes: Any) -> dict[str, Any]:
    return {"keys": {**LINEAR, **{key.replace("__", "."): v for key, v in changes.items()}}}


def tokenizer(**changes: Any) -> dict[str, Any]:
    return {"tokenizer": {**TOKENIZER, **{f"tokenizer.ggml.{k}": v for k, v in changes.items()}}}


RIGHT = {
    "llama": {"keys": PLAIN},
    "llama linear": {"keys": LINEAR},
    "llama none": {"keys": {**PLAIN, "rope.scaling.type": "none"}},
    "llama sentencepiece": {"keys": LINEAR, "tokenizer": SPM},
    "llama3": {"keys": {**PLAIN, "context_length": 131072}, "tensors": ROPE_FREQS},
    "linear over llama3": {"keys": OVER_LLAMA3, "tensors": ROPE_FREQS},
    "llama3 as recorded": {
        "keys": PLAIN,
        "tensors": ODD_FREQS,
        "general": RECORD,
        "types": dict.fromkeys((key for key in RECORD if "factor" in key), Type.FLOAT64),
    },
    "llama yarn": {"keys": YARN},
    "both spellings of one factor": linear(rope__scale_linear=8.0),
    "the longest context": {"keys": {**PLAIN, "context_length": 2**31 - 1}},
    "qwen2": {"architecture": "qwen2", "keys": LINEAR},
    "gemma": {"architecture": "gemma", "keys": PLAIN, "tokenizer": SPM},
    "gemma3": {"architecture": "gemma3", "keys": GEMMA3, "tokenizer": SPM},
    "phi3": {"architecture": "phi3", "keys": PHI3, "tensors": PHI3_FACTORS},
    "stablelm": {"architecture": "stablelm", "keys": {**PLAIN, "rope.dimension_count": 4}},
    "gpt2": {"architecture": "gpt2", "keys": {**SIZES, "context_length": 128}},
    "granitehybrid": {
        "architecture": "granitehybrid",
        "keys": {**PLAIN, "rope.scaling.finetuned": False},
    },
}


W, N = Severity.WRONG, Severity.NOTE
EIGHT = "llama.rope.scaling.factor"
# finding id, severity, the file
FAULTS: list[tuple[str, Severity, dict[str, Any]]] = [
    ("file.architecture.unknown", W, {**linear(), "architecture": "gemma9"}),
    ("keys.type", W, {**linear(), "types": {EIGHT: Type.FLOAT64}}),
    ("keys.type", W, {**linear(rope__scaling__factor="8")}),
    ("keys.type", W, {**linear(), "types": {"llama.context_length": Type.UINT64}}),
    ("keys.not-finite", W,
     {"keys": {**PLAIN, "attention.scale": float("inf")}}),
    ("rope.type.unknown", W, linear(rope__scaling__type="ntk")),
    ("rope.type.none-with-factor", W, linear(rope__scaling__type="none")),
    ("rope.type.missing", N, linear(rope__scaling__type=None)),
    ("rope.yarn.no-original-context", W,
     {"keys": {**YARN, "rope.scaling.original_context_length": None}}),
    ("rope.longrope.no-original-context", W,
     linear(rope__scaling__type="longrope", rope__scaling__original_context_length=None)),
    ("rope.factor.missing", W, linear(rope__scaling__factor=None)),
    ("rope.factor.zero", W, linear(rope__scaling__factor=0.0)),
    ("rope.factor.below-one", W, linear(rope__scaling__factor=0.125)),
    ("rope.factor.below-one", W, linear(rope__scaling__factor=-8.0)),
    ("rope.factor.not-finite", W, linear(rope__scaling__factor=float("nan"))),
    ("rope.factor.not-finite", W, linear(rope__scaling__factor=float("inf"))),
    ("rope.factor.contradictory", W, linear(rope__scale_linear=4.0)),
    ("rope.factor.legacy-key", N, linear(rope__scale_linear=8.0, rope__scaling__factor=None)),
    ("rope.factor.dropped", W, linear(rope__scaling__factor=None, rope__scaling__type=None)),
    ("context.missing", W, linear(context_length=None)),
    ("context.missing", W, linear(context_length=0)),
    ("context.out-of-range", W, {"keys": {**PLAIN, "context_length": 2**31}}),
    ("context.out-of-range", W, linear(context_length=2**32 - 1)),
    ("context.not-extended", W, linear(context_length=128)),
    ("context.not-extended", W,
     {**linear(context_length=4096, rope__scaling__factor=4.0,
               rope__scaling__original_context_length=None),
      "general": {"general.name": "vicuna-7b-v1.5-16k"}}),
    ("context.original-missing", N, linear(rope__scaling__original_context_length=None)),
    ("context.over-claimed", W, linear(context_length=2048)),
    ("context.over-claimed", N, {"keys": {**YARN, "context_length": 2048}}),
    ("context.below-full", N, linear(context_length=512)),
    ("context.below-original", W, linear(context_length=64)),
    ("context.below-original", W,
     {"keys": {**PLAIN, "rope.scaling.original_context_length": 256}}),
    ("rope.theta.missing", N, linear(rope__freq_base=None)),
    ("rope.theta.missing", W, {**linear(rope__freq_base=None), "architecture": "qwen2"}),
    ("rope.theta.out-of-range", W, linear(rope__freq_base=float("nan"))),
    ("rope.dimensions.mismatch", W, linear(rope__dimension_count=8)),
    ("rope.dimensions.mismatch", W, linear(rope__dimension_count=0)),
    ("rope.dimensions.mismatch", W,
     {"architecture": "qwen2", "keys": {**PLAIN, "rope.dimension_count": 8}}),
    ("rope.dimensions.mismatch", W,
     {"architecture": "gemma", "keys": {**PLAIN, "rope.dimension_count": 0}}),
    ("rope.dimensions.mismatch", W,
     {"architecture": "stablelm",
      "keys": {**PLAIN, "rope.dimension_count": 0, "attention.head_count": None}}),
    ("rope.dimensions.mismatch", W,
     {"architecture": "gemma", "keys": {**PLAIN, "rope.dimension_count": 32}}),
    ("rope.attention-factor.not-yarn", W, linear(rope__scaling__attn_factor=0.8)),
    ("rope.attention-factor.out-of-range", W, linear(rope__scaling__attn_factor=0.0)),
    ("rope.factors.not-loaded", W, {"architecture": "qwen2", "tensors": ROPE_FREQS}),
    ("rope.factors.ignored", W, {"architecture": "llada", "tensors": ROPE_FREQS}),
    ("rope.factors.size", W, {"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}),
    ("rope.factors.not-positive", W, {"tensors": {"rope_freqs.weight": np.zeros(8, np.float32)}}),
    ("rope.factors.ones", N, {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}),
    ("rope.factors.unknown", N,
     {"tensors": {"rope_freqs.weight": np.linspace(1, 7.5, 8, dtype=np.float32)}}),
    ("rope.factors.record", W, {"tensors": ROPE_FREQS, "general": {**RECORD, FACTOR_OF_IT: 9.0}}),
    ("rope.factors.record", W, {"tensors": ROPE_FREQS, "general": {**RECORD, FACTOR_OF_IT: None}}),
    ("rope.factors.scaled-twice", W, {**linear(), "tensors": ROPE_FREQS}),
    ("rope.factors.interpolated", N, {"keys": OVER_LLAMA3, "tensors": ROPE_FREQS}),
    ("rope.not-used", W, {**linear(), "architecture": "gpt2"}),
    ("rope.window-layers-unscaled", N, {"architecture": "gemma3", "keys": GEMMA3}),
    ("rope.switched-off", W,
     {"architecture": "granite", "keys": {**PLAIN, "rope.scaling.finetuned": False}}),
    ("rope.switched-off", W,
     {"architecture": "granitehybrid", "keys": {**LINEAR, "rope.scaling.finetuned": False}}),
    ("attention.window-ignored", N, linear(attention__sliding_window=64)),
    ("tokenizer.missing", W, {"tokenizer": {}}),
    ("tokenizer.model.unknown", W, tokenizer(model="nonsense")),
    ("tokenizer.model.unknown", W, tokenizer(model="")),
    ("tokenizer.merges.missing", W, tokenizer(model="hybriddna", merges=None)),
    ("tokenizer.none", N, {"tokenizer": {"tokenizer.ggml.model": "no_vocab"}}),
    ("tokenizer.tokens.missing", W, tokenizer(tokens=None)),
    ("tokenizer.lengths", W, tokenizer(token_type=[1] * (VOCABULARY - 1))),
    ("tokenizer.lengths", N, tokenizer(token_type=[1] * (VOCABULARY + 1))),
    ("tokenizer.scores.missing", W, {"tokenizer": {**SPM, "tokenizer.ggml.scores": None}}),
    ("tokenizer.types.missing", N, tokenizer(token_type=None)),
    ("tokenizer.merges.missing", W, tokenizer(merges=None)),
    ("tokenizer.size", W, tokenizer(tokens=["a", "b"], token_type=[1, 1])),
    ("tokenizer.pre.missing", W, tokenizer(pre=None)),
    ("tokenizer.pre.default", N, tokenizer(pre="default")),
    ("tokenizer.pre.unknown", W, tokenizer(pre="nobody")),
    ("tokenizer.id.out-of-range", W, tokenizer(eos_token_id=VOCABULARY)),
    ("tokenizer.id.out-of-range", N, tokenizer(padding_token_id=2**32 - 1)),
    ("tokenizer.id.missing", N, tokenizer(eos_token_id=None)),
    ("tokenizer.bos.unusable", W, tokenizer(bos_token_id=None, add_bos_token=True)),
    ("tokenizer.add-bos.missing", N, tokenizer(add_bos_token=None)),
    ("tokenizer.chat-template.missing", N,
     {"tokenizer": {**TOKENIZER, "tokenizer.chat_template": None}}),
    ("tensors.name", W, {"architecture": "gemma", "tensors": {"x" * 64: np.ones(1, np.float32)}}),
    ("tensors.none", N, {"tensors": dict.fromkeys(tensors_of("llama"))}),
    ("tensors.fit", W, {"tensors": {"blk.1.attn_q.weight": None}}),
    ("tensors.fit", W, {"tensors": {"stray.weight": np.ones(4, np.float32)}}),
    ("tensors.fit", W, {"tensors": {"blk.0.attn_k.weight": np.ones((64, 64), np.float32)}}),
    ("tensors.fit", W, {"keys": {**PLAIN, "attention.head_count": None}}),
    ("tensors.blocks", W, {"architecture": "gemma", "keys": {**PLAIN, "block_count": 1}}),
    ("tensors.blocks", W, {"architecture": "gemma", "keys": {**PLAIN, "block_count": 3}}),
    ("file-type.mismatch", N, {"general": {"general.file_type": 15}}),
    ("file-type.missing", N, {"general": {"general.file_type": None}}),
    ("metadata.local-path", N, {"general": {"quantize.imatrix.file": "/home/me/imatrix.dat"}}),
    ("metadata.local-path", N, {"general": {"general.source.url": "C:\\models\\x"}}),
    ("file.split", N, {"general": {"split.count": 2}, "tensors": {"output_norm.weight": None}}),
    ("weights.order-unseen", N, {}),
]  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_wrong_with_a_right_file(tmp_path: Path, name: str) -> None:
    audit = audit_path(write_header(tmp_path / "right.gguf", **RIGHT[name]))
    assert audit.of(Severity.WRONG) == ()
    assert audit.is_right


def test_nothing_is_wrong_with_the_default_model(default_gguf: Path) -> None:
    audit = audit_path(default_gguf)
    assert audit.is_right
    assert [finding.id for finding in audit.of(Severity.NOTE)] == ["weights.order-unseen"]


@pytest.mark.parametrize(
    ("expected", "severity", "made"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)]
)
def test_each_fault_has_its_finding(
    tmp_path: Path, expected: str, severity: Severity, made: dict[str, Any]
) -> None:
    audit = audit_path(write_header(tmp_path / "fault.gguf", **made))
    found = {(finding.id, finding.severity) for finding in audit.findings}
    assert (expected, severity) in found
    if severity is N:  # a note alone fails nothing
        assert audit.of(W) == ()
    for finding in audit.of(W):
        assert finding.expected


def test_wrong_findings_are_few(tmp_path: Path) -> None:
    """A fault is not reported over and over: at most two findings for one fault."""
    for index, (_, _, made) in enumerate(FAULTS):
        audit = audit_path(write_header(tmp_path / f"{index}.gguf", **made))
        assert len(audit.of(W)) <= 2, [finding.id for finding in audit.of(W)]


def test_a_file_with_a_gap_is_wrong(tmp_path: Path) -> None:
    path = write_header(tmp_path / "gap.gguf")
    data = path.read_bytes()
    reader = gguf.GGUFReader(path)
    last = reader.tensors[-1]
    field = bytearray(data)
    position = last.field.offset + sum(part.nbytes for part in last.field.parts[:-1])
    old = int.from_bytes(data[position : position + 8], "little")
    field[position : position + 8] = (old + 32).to_bytes(8, "little")
    path.write_bytes(bytes(field) + bytes(32))
    assert "tensors.offset" in {finding.id for finding in audit_path(path).of(W)}


@pytest.mark.parametrize("cut", [3, 40, 900, -1])
def test_a_truncated_file_is_one_finding(tmp_path: Path, cut: int) -> None:
    path = write_header(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    audit = audit_path(path)
    assert [finding.id for finding in audit.findings] == ["file.readable"]
    assert not audit.is_right


def test_exit_codes_and_text(tmp_path: Path) -> None:
    right = write_header(tmp_path / "right.gguf", keys=LINEAR)
    result = CliRunner().invoke(command, [str(right)])
    assert result.exit_code == 0, result.output
    assert "rope.scaling: linear, factor 8" in result.output
    wrong = write_header(tmp_path / "wrong.gguf", keys={**LINEAR, "rope.scaling.type": "none"})
    result = CliRunner().invoke(command, [str(wrong)])
    assert result.exit_code == 3
    assert "WRONG  rope.type.none-with-factor" in result.output
    assert f"pi-convert fix {wrong}" in " ".join(result.output.split())
    with pytest.raises(SourceError, match="no such file"):
        CliRunner().invoke(command, [str(tmp_path / "nowhere.gguf")], catch_exceptions=False)


def test_json(tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.gguf", keys={**LINEAR, "rope.scaling.factor": float("nan")})
    result = CliRunner().invoke(command, [str(path), "--json"])
    assert result.exit_code == 3
    document = json.loads(result.output)
    assert document["schema_version"] == 1
    assert document["right"] is False
    assert document["counts"]["wrong"] == sum(
        finding["severity"] == "wrong" for finding in document["findings"]
    )
    assert "rope.factor.not-finite" in {finding["id"] for finding in document["findings"]}


LOADER = """
import ctypes, sys
import llama_cpp
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama_cpp.llama_model_default_params()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
if not model:
    sys.exit(print("refused"))
context = llama_cpp.llama_model_n_ctx_train(model)
if context < 0:
    sys.exit(print("a context of", context))
params = llama_cpp.llama_context_default_params()
params.n_ctx = 64
llama_cpp.llama_init_from_model(model, params)
print(llama_cpp.llama_model_rope_freq_scale_train(model))
"""


def loaded_by_llama_cpp(path: Path) -> str:
    """The scale llama.cpp loads, "refused", or "aborted"."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(path)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "aborted"


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"keys": LINEAR}, "0.125"),
        ({"keys": LINEAR, "tokenizer": SPM}, "0.125"),
        ({"architecture": "qwen2", "keys": LINEAR}, "0.125"),
        (linear(rope__scaling__type=None), "0.125"),
        (linear(rope__scaling__factor=0.0), "1.0"),
        (linear(rope__scale_linear=8.0, rope__scaling__factor=None), "0.125"),
        (linear(rope__scaling__type="ntk"), "aborted"),
        ({**linear(), "types": {EIGHT: Type.FLOAT64}}, "refused"),
        (linear(rope__scale_linear=4.0), "0.125"),
        (linear(rope__dimension_count=8), "refused"),
        (linear(rope__dimension_count=0), "refused"),
        (linear(context_length=2**31), "a context of -2147483648"),
        ({"architecture": "qwen2", "keys": {**PLAIN, "rope.dimension_count": 0}}, "aborted"),
        (tokenizer(model="nonsense"), "refused"),
        (linear(context_length=None), "refused"),
        ({"architecture": "qwen2", "tensors": ROPE_FREQS}, "refused"),
        (tokenizer(merges=None), "refused"),
        ({"types": {"tokenizer.ggml.eos_token_id": Type.INT32}}, "refused"),
        (tokenizer(pre="nobody"), "refused"),
        (tokenizer(tokens=["a", "b"], token_type=[1, 1]), "refused"),
        (tokenizer(token_type=[1] * (VOCABULARY - 1)), "refused"),
    ],
)  # fmt: skip
def test_llama_cpp_does_what_the_findings_say(
    tmp_path: Path, made: dict[str, Any], says: str
) -> None:
    path = write_header(tmp_path / "model.gguf", **made)
    assert loaded_by_llama_cpp(path) == says
    if says in ("refused", "aborted") or says.startswith("a context"):
        assert not audit_path(path).is_right


# Findings that need more than other keys and tensors; each has a test of its own above.
ELSEWHERE = {"file.readable", "file.architecture", "tensors.offset", "tensors.trailing-bytes"}


def test_every_finding_is_documented_and_tested() -> None:
    repository = Path(__file__).parents[3]
    document = (repository / "docs" / "check.md").read_text("utf-8").split("## ONNX")[0]
    documented = set(re.findall(r"^\| `([a-z0-9.-]+)` \|", document, re.MULTILINE))
    assert documented == {fault[0] for fault in FAULTS} | ELSEWHERE
    rules = set(re.findall(r"`([a-z.-]+)`", document.split("### File")[0].split("own id")[1]))
    quiet = {"file.known", "rope.use", "rope.attention-factor", "attention.window", "weights.order"}
    assert rules == {rule.id for rule in RULES} - quiet


def test_trailing_bytes_are_noted(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes() + bytes(64))
    assert "tensors.trailing-bytes" in {f.id for f in audit_path(path).of(N)}


def test_a_file_without_an_architecture_is_wrong(tmp_path: Path) -> None:
    path = write_header(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architecturf"))
    assert [f.id for f in audit_path(path).findings] == ["file.architecture"]


def test_text_fits_the_width(tmp_path: Path) -> None:
    keys = {**LINEAR, "rope.scaling.type": "none", "rope.scaling.attn_factor": 0.8}
    audit = audit_path(write_header(tmp_path / "a.gguf", keys=keys))
    for width in (60, 80):
        lines = audit_text(replace(audit, file="a.gguf"), width=width).splitlines()
        assert max(map(len, lines)) <= width


ANY_VALUE = (
    st.booleans()
    | st.integers(0, 2**32 - 1)
    | st.floats(width=32)
    | st.text(max_size=8)
    | st.lists(st.integers(-9, 9), min_size=1, max_size=3)
)
ROPE_KEYS = sorted({*LINEAR, *LOADED_TYPES, "attention.key_length", "attention.value_length"})
ANY_KEYS = st.dictionaries(st.sampled_from(ROPE_KEYS), ANY_VALUE, max_size=4)
ANY_TOKENIZER = st.dictionaries(st.sampled_from(sorted({*TOKENIZER, *SPM})), ANY_VALUE, max_size=3)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    architecture=st.sampled_from(["llama", "qwen2", "gemma3", "granite", "gpt2", "phi3"]),
    keys=ANY_KEYS,
    tokenizer_keys=ANY_TOKENIZER,
)
def test_any_values_are_audited(
    tmp_path: Path, architecture: str, keys: dict[str, Any], tokenizer_keys: dict[str, Any]
) -> None:
    """No value of any type makes an audit, a description or a repair plan fail as a bug would."""
    path = tmp_path / "any.gguf"
    write_header(
        path, architecture, {**LINEAR, **keys}, tokenizer={**TOKENIZER, **tokenizer_keys},
        tensors=ROPE_FREQS if len(keys) > 2 else None,
    )  # fmt: skip
    audit = audit_path(path)
    assert audit.findings
    audit_text(audit)
    json.dumps(audit_json(audit), allow_nan=False)
    file = read_gguf_file(path)
    description = describe_gguf(file)
    description_text(description)
    json.dumps(description_json(description), allow_nan=False)
    with contextlib.suppress(ConvertError):
        plan_repair(file, 8.0, None)


def test_the_architectures_are_llama_cpps(llama_cpp_source: Path) -> None:
    text = (llama_cpp_source / "src" / "llama-arch.cpp").read_text("utf-8")
    table = text.split("LLM_ARCH_NAMES = {")[1].split("};")[0]
    names = set(re.findall(r'\{ *LLM_ARCH_\w+, *"([^"]+)"', table)) - {"(unknown)"}
    assert names == llamacpp.ARCHITECTURES
