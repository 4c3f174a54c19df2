"""Verdicts that are neither a plain proof nor a plain fault, and the presets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.errors import EnvironmentNotReadyError, SourceError
from converters.sources import open_checkpoint
from converters.targets.gguf import plan_gguf, write_gguf
from pi_convert.evaluate.texts import Document
from pi_convert.runtimes.llamacpp import LlamaCppOptions
from pi_convert.verify import LinkName, Outcome, Status, Verdict, VerifyRequest, verify
from tests.pi_convert.verify.conftest import BLOCKS, QWEN2_BLOCKS, TINY, Exporter
from tests.pi_convert.verify.gguf_tools import edit, edit_rope
from tests.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("few_tokens")

ONE_THREAD = LlamaCppOptions(threads=1)
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
        "original_max_position_embeddings": 8192,
    }
}


def run(path: Path, source: Any, scale: float | None, **options: Any) -> Verdict:
    request = VerifyRequest(path, source, scale, texts=TEXT, llamacpp=ONE_THREAD, **options)
    return verify(request)


def statuses(verdict: Verdict) -> dict[str, Status]:
    return {link.name.value: link.status for link in verdict.links}


def test_a_claim_that_nobody_stated_is_inconclusive(export: Exporter) -> None:
    right = export("f16")
    verdict = run(right.path, right.source, None)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.outcome.exit_code == 3
    link = verdict.link(LinkName.ROPE)
    assert link.summary == "consistent with the factor 8 it claims; give --scale 8 to prove it"
    assert verdict.link(LinkName.EXECUTION).status is Status.PASSED


def test_a_source_that_is_scaled_itself_needs_no_scale(export: Exporter, tmp_path: Path) -> None:
    rope = {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "max_position_embeddings": 512,
    }
    right = export("f16", scale=1.0, rope=rope)
    assert run(right.path, right.source, None).outcome is Outcome.PROVEN
    wrong = edit_rope(right.path, tmp_path / "w.gguf", {"rope.scaling.factor": 8.0})
    verdict = run(wrong, right.source, None)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert verdict.link(LinkName.ROPE).cause == "the factor is 8, expected 4"


def test_llama3_and_pi_over_it(export: Exporter, tmp_path: Path) -> None:
    right = export("f16", scale=2.0, rope=LLAMA3)
    verdict = run(right.path, right.source, 2.0)
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()

    def lose(file: Any) -> None:
        del file.tensors["rope_freqs.weight"]

    lost = run(edit(right.path, tmp_path / "lost.gguf", lose), right.source, 2.0)
    assert lost.outcome is Outcome.NOT_PROVEN
    assert "rope_freqs.weight is missing" in (lost.link(LinkName.ROPE).cause or "")

    def bend(file: Any) -> None:
        tensor = file.tensors["rope_freqs.weight"]
        values = tensor.values()
        values[3] *= np.float32(1.01)
        file.tensors["rope_freqs.weight"] = tensor.with_values(values)

    bent = run(edit(right.path, tmp_path / "bent.gguf", bend), right.source, 2.0)
    assert "differs in 1 elements, first 3" in (bent.link(LinkName.ROPE).cause or "")


def test_another_architecture_is_a_failed_link(export: Exporter) -> None:
    llama, qwen2 = export("f16"), export("f16", architecture="qwen2")
    verdict = run(llama.path, qwen2.source, 8.0)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert verdict.link(LinkName.WEIGHTS).cause == "the artifact is llama, the source is qwen2"
    assert statuses(verdict)["execution"] is Status.NOT_RUN


def test_another_model_of_the_architecture_is_named_by_its_sizes(export: Exporter) -> None:
    small, large = export("f16"), export("q8_0")
    verdict = run(small.path, large.source, 8.0)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert "hidden_size is 144, the source's is 256" in verdict.link(LinkName.WEIGHTS).findings
    assert statuses(verdict)["execution"] is Status.NOT_RUN


def test_a_file_that_is_no_gguf_is_an_error_and_not_a_verdict(
    export: Exporter, tmp_path: Path
) -> None:
    right = export("f16")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(right.path.read_bytes()[:-1000])
    with pytest.raises(SourceError, match=r"cut\.gguf"):
        run(cut, right.source, 8.0)
    with pytest.raises(EnvironmentNotReadyError, match="GPU"):
        verify(
            VerifyRequest(right.path, right.source, 8.0, llamacpp=LlamaCppOptions(device="cuda"))
        )


def test_llama_cpps_own_quantization_is_judged_by_its_error(
    export: Exporter, tmp_path: Path
) -> None:
    """A file of another build: bytes may differ, the distance from the source may not."""
    right = export("q4_k_m")

    def forget(file: Any) -> None:
        del file.keys["pi_convert.quantizer"]
        name = "blk.0.ffn_up.weight"
        raw = file.tensors[name].raw.copy()
        raw[7, 30] ^= 1  # one quantized value by one step, as another rounding gives
        file.tensors[name] = type(file.tensors[name])(
            file.tensors[name].shape, file.tensors[name].type, raw
        )

    other = run(edit(right.path, tmp_path / "other.gguf", forget), right.source, 8.0)
    link = other.link(LinkName.WEIGHTS)
    assert other.outcome is Outcome.PROVEN, other.to_json()
    assert "does not record its quantizer" in link.notes[0]
    assert float(link.measures["largest error over this build's"]) < 1.01

    def coarse(file: Any) -> None:
        forget(file)
        name = "blk.0.ffn_up.weight"
        raw = file.tensors[name].raw.copy()
        raw[:, 16::144] ^= 8  # one value of every block by half its range
        file.tensors[name] = type(file.tensors[name])(
            file.tensors[name].shape, file.tensors[name].type, raw
        )

    bad = run(edit(right.path, tmp_path / "bad.gguf", coarse), right.source, 8.0)
    assert bad.link(LinkName.WEIGHTS).status is Status.FAILED


def test_a_kept_gguf_is_compared_byte_for_byte(export: Exporter, tmp_path: Path) -> None:
    """A GGUF source whose tensors are kept: no quantizer takes part, torch holds one model."""
    plain = export("q4_k_m", scale=1.0)
    source = open_checkpoint(str(plain.path))
    scaled = source.interpolate(8)
    (artifact,) = write_gguf(scaled, plan_gguf(scaled, []), tmp_path / "out")
    verdict = run(artifact.path, source, 8.0)
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()
    copied = verdict.link(LinkName.WEIGHTS).measures
    assert copied["kept as stored in the source"]
    execution, quality = verdict.link(LinkName.EXECUTION), verdict.link(LinkName.QUALITY)
    assert quality.measures["mean KL against the source"] == execution.measures["mean KL, across L"]


def test_full_gates_quality_by_the_margins(export: Exporter) -> None:
    right = export("q8_0")
    proven = run(right.path, right.source, 8.0, preset="full")
    link = proven.link(LinkName.QUALITY)
    assert link.status is Status.PASSED, link
    assert proven.outcome is Outcome.PROVEN
    assert int(link.measures["documents"]) >= 8
    strict = run(right.path, right.source, 8.0, preset="full", max_kl=1e-6)
    assert strict.outcome is Outcome.NOT_PROVEN
    assert "at most 1e-06" in (strict.link(LinkName.QUALITY).cause or "")
    # The margin lies inside the interval: neither proven nor refuted.
    kl = float(link.measures["mean KL against the source"])
    upper = float(link.measures["mean KL, upper end of 95 %"])
    between = run(right.path, right.source, 8.0, preset="full", max_kl=(kl + upper) / 2)
    assert between.link(LinkName.QUALITY).status is Status.INCONCLUSIVE
    assert between.outcome is Outcome.INCONCLUSIVE


def test_what_stops_quality_says_nothing_against_execution(
    export: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise SourceError("no documents")

    monkeypatch.setattr("pi_convert.verify.quality.judge_quality", stop)
    right = export("f16")
    verdict = run(right.path, right.source, 8.0, preset="full")
    assert verdict.link(LinkName.EXECUTION).status is Status.PASSED
    assert verdict.link(LinkName.QUALITY).cause == "no documents"


def test_a_run_that_llama_cpp_refuses_is_a_finding_of_rope(
    export: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SourceError("llama.cpp cannot evaluate 512 tokens")

    monkeypatch.setattr("pi_convert.verify.rope._Identity._run", refuse)
    right = export("f16")
    link = run(right.path, right.source, 8.0).link(LinkName.ROPE)
    assert link.status is Status.FAILED
    assert link.cause == "llama.cpp cannot evaluate 512 tokens"


def test_another_tool_may_leave_out_what_no_text_shows(export: Exporter, tmp_path: Path) -> None:
    right = export("f16")

    def foreign(file: Any) -> None:
        del file.keys["pi_convert.version"]
        del file.keys["tokenizer.chat_template"]
        del file.keys["tokenizer.ggml.unknown_token_id"]

    verdict = run(edit(right.path, tmp_path / "foreign.gguf", foreign), right.source, 8.0)
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()
    notes = verdict.link(LinkName.TOKENIZER).notes
    assert "the chat template is missing" in notes
    assert any(note.startswith("the unknown token is none") for note in notes)


def test_quick_reports_quality_and_what_interpolation_costs(export: Exporter) -> None:
    right = export("f16")
    verdict = run(right.path, right.source, 8.0)
    link = verdict.link(LinkName.QUALITY)
    assert link.status is Status.REPORTED
    assert float(link.measures["mean KL, factor 8 against 1"]) > 0.1
    assert "fine-tuning mends it" in link.notes[0]


def test_a_model_that_cannot_tell_a_wrong_rope_is_inconclusive(
    export: Exporter, tmp_path: Path
) -> None:
    """With no attention to speak of, RoPE does not matter, and agreement says nothing of it."""
    from safetensors.numpy import load_file, save_file

    folder = write_tiny(tmp_path / "flat", shape=TINY)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "o_proj" in name:
            weights[name] = weights[name] * np.float32(1e-5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(str(folder))
    scaled = source.interpolate(8)
    (artifact,) = write_gguf(scaled, plan_gguf(scaled, ["f16"]), tmp_path / "out")
    verdict = run(artifact.path, source, 8.0)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    link = verdict.link(LinkName.EXECUTION)
    assert link.status is Status.INCONCLUSIVE
    assert not all(control.seen for control in link.controls)


def test_a_wrong_graph_fails_execution_and_rope_is_ruled_out(
    export: Exporter, tmp_path: Path
) -> None:
    """Attention to what comes after: every stored value of RoPE and every tensor is right."""
    right = export("f16")
    wrong = edit_rope(right.path, tmp_path / "causal.gguf", {"attention.causal": False})
    verdict = run(wrong, right.source, 8.0)
    assert verdict.outcome is Outcome.NOT_PROVEN
    found = statuses(verdict)
    assert found["rope"] is found["weights"] is found["tokenizer"] is Status.PASSED
    link = verdict.link(LinkName.EXECUTION)
    assert link.status is Status.FAILED
    assert "not the RoPE keys" in (link.cause or "")


def test_a_wrong_factor_is_named_by_imposing_the_right_one(
    export: Exporter, tmp_path: Path
) -> None:
    right = export("f16")
    wrong = edit_rope(right.path, tmp_path / "four.gguf", {"rope.scaling.factor": 4.0})
    verdict = run(wrong, right.source, 8.0)
    rope, execution = verdict.link(LinkName.ROPE), verdict.link(LinkName.EXECUTION)
    assert "imposing rope.scaling.factor 8.0 alone makes them right" in rope.findings[-1]
    assert "RoPE: with factor 8" in (execution.cause or "")


def test_the_verdict_is_json_of_a_stated_version(export: Exporter, tmp_path: Path) -> None:
    right = export("f16")
    nan = edit_rope(right.path, tmp_path / "nan.gguf", {"rope.scaling.attn_factor": 1e30})
    for path in (right.path, nan):
        document = run(path, right.source, 8.0).to_json()
        again = json.loads(json.dumps(document, allow_nan=False))
        assert again["schema_version"] == 1
        assert [link["name"] for link in again["links"]] == [
            "rope", "weights", "tokenizer", "execution", "quality",
        ]  # fmt: skip
        assert set(again["links"][0]) == {
            "name", "status", "summary", "measures", "controls", "cause", "findings", "notes",
            "series",
        }  # fmt: skip


CONVERTER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
convert_hf_to_gguf.main()
"""


@pytest.mark.parametrize("ftype", ["f16", "q8_0"])
def test_llama_cpps_own_conversion_passes_with_notes(
    ftype: str, llama_cpp_source: Path, tmp_path: Path
) -> None:
    rope = {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "max_position_embeddings": 512,
    }
    folder = write_tiny(tmp_path / "model", shape=BLOCKS, rope=rope)
    out = tmp_path / f"theirs-{ftype}.gguf"
    subprocess.run(
        [sys.executable, "-c", CONVERTER, str(llama_cpp_source), str(folder),
         "--outfile", str(out), "--outtype", ftype],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(llama_cpp_source / "gguf-py")},
    )  # fmt: skip
    verdict = run(out, open_checkpoint(str(folder)), None)
    assert verdict.outcome is Outcome.PROVEN, verdict.to_json()
    assert any("original_context_length" in note for note in verdict.link(LinkName.ROPE).notes)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_right_exports_of_every_type_are_proven(architecture: str, export: Exporter) -> None:
    from converters.targets.gguf import quantization_types

    size = QWEN2_BLOCKS if architecture == "qwen2" else BLOCKS
    first = export("f16", architecture=architecture, shape=size)
    types = [
        option.name
        for option in quantization_types(first.source)
        if not option.needs_importance_matrix
    ]
    assert len(types) > 20
    found = {}
    for number, ftype in enumerate(types):
        scale = (1.1, 2.2, 3.0)[number % 3]
        right = export(ftype, architecture=architecture, scale=scale, shape=size)
        verdict = run(right.path, right.source, scale)
        if verdict.outcome is not Outcome.PROVEN:
            found[ftype] = [(link.name.value, link.summary) for link in verdict.links]
    assert not found
