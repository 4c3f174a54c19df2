"""What a verdict says beside pass and fail: another source, an old key, a control not seen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from converters.checkpoint import Checkpoint
from converters.encodings import Encoding
from converters.errors import UnsupportedError
from converters.progress import silent
from converters.rope.gguf import FACTOR_KEY, LEGACY_FACTOR_KEY
from converters.sources import open_checkpoint
from converters.targets.gguf.metadata import QUANTIZER_KEY, SOURCE_HASH_KEY, SOURCE_NAME_KEY
from pi_convert.evaluate.texts import Document
from pi_convert.runtimes.llamacpp import LlamaCppOptions
from pi_convert.verify import LinkName, Status, VerifyRequest, gates, verify
from pi_convert.verify.encode import encode
from pi_convert.verify.gguf_artifact import GgufArtifact, open_gguf_artifact
from pi_convert.verify.request import Subject, expected_rope
from pi_convert.verify.rope import _notes
from pi_convert.verify.verdict import LinkResult
from pi_convert.verify.weights import verify_weights
from tests.pi_convert.verify.conftest import TINY, Exporter
from tests.pi_convert.verify.gguf_tools import edit, edit_rope
from tests.tiny import write_tiny

TEXT = tuple(
    Document(f"text {i}", f"{i}. RoPE turns pairs by position; 12 and 345.\n" * 8)
    for i in range(12)
)


def opened(path: Path, source: Checkpoint) -> GgufArtifact:
    """The artifact as verification sees it."""
    return open_gguf_artifact(path, source, LlamaCppOptions())


def weights(path: Path, source: Checkpoint) -> LinkResult:
    """Link 2."""
    request = VerifyRequest(path, source, 8.0)
    artifact = opened(path, source)
    subject = Subject(request, artifact, expected_rope(request, artifact))
    return verify_weights(subject, silent)


def source_notes(path: Path, source: Checkpoint) -> tuple[str, ...]:
    """Link 2's notes."""
    return weights(path, source).notes


def test_a_type_that_cannot_be_made_here_is_inconclusive(
    export: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As iq2_xxs, which takes an importance matrix: no fault of the file, and no proof of it."""
    right = export("q4_k_m")
    foreign = edit(right.path, tmp_path / "a.gguf", lambda file: file.keys.pop(QUANTIZER_KEY))

    def refuse(values: Any, encoding: Encoding) -> Any:
        if encoding.name == "q4_k":
            raise UnsupportedError("q4_k needs an importance matrix")
        return encode(values, encoding)

    assert weights(foreign, right.source).status is Status.PASSED
    monkeypatch.setattr("pi_convert.verify.weights.encode", refuse)
    link = weights(foreign, right.source)
    assert link.status is Status.INCONCLUSIVE
    assert "tensors cannot be compared: q4_k cannot be made or read here" in link.summary


@pytest.mark.parametrize("ftype", ["f16", "q4_k_m"])
def test_the_recorded_source_itself_is_no_note(export: Exporter, ftype: str) -> None:
    right = export(ftype)
    assert source_notes(right.path, right.source) == ()


def test_the_source_under_another_name_is_a_note(export: Exporter, tmp_path: Path) -> None:
    right = export("f16")
    assert right.source.origin.path is not None
    shutil.copytree(right.source.origin.path, tmp_path / "renamed")
    (note,) = source_notes(right.path, open_checkpoint(str(tmp_path / "renamed")))
    assert note == (
        "the file records the source 'tiny-llama', --against is 'renamed': the weights are the same"
    )


def test_other_weights_under_the_recorded_name_are_a_note(export: Exporter, tmp_path: Path) -> None:
    right = export("f16")
    folder = write_tiny(tmp_path / "tiny-llama", shape=TINY, dtype="bf16")
    link = weights(right.path, open_checkpoint(str(folder)))
    (note,) = link.notes
    assert link.cause == link.summary == f"--against is another model: {note}"
    recorded = str(opened(right.path, right.source).file.keys[SOURCE_HASH_KEY])
    assert note.startswith("the file records other weights of tiny-llama: ")
    assert note.endswith("another --revision has them")
    assert f"SHA-256 {recorded[:12]}… there and " in note


def test_a_file_that_records_no_source_has_no_note(export: Exporter, tmp_path: Path) -> None:
    right = export("f16")

    def forget(file: Any) -> None:
        del file.keys[SOURCE_NAME_KEY], file.keys[SOURCE_HASH_KEY]

    assert source_notes(edit(right.path, tmp_path / "a.gguf", forget), right.source) == ()


def test_both_spellings_of_the_factor_are_told_apart(export: Exporter, tmp_path: Path) -> None:
    right = export("f16")
    both = edit_rope(right.path, tmp_path / "both.gguf", {LEGACY_FACTOR_KEY: 4.0})
    assert list(_notes(opened(both, right.source))) == [
        "rope.scale_linear 4 stands beside rope.scaling.factor 8: llama.cpp reads"
        " rope.scaling.factor alone"
    ]
    old = edit(both, tmp_path / "old.gguf", lambda file: file.remove(FACTOR_KEY))
    assert list(_notes(opened(old, right.source))) == [
        "the factor stands in the old rope.scale_linear"
    ]


@pytest.mark.usefixtures("few_tokens")
def test_a_control_that_was_not_seen_is_one_sentence_with_its_numbers(
    export: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "IDENTITY_CONTROL_STRETCH", 1.0)  # no other factor: not to be seen
    right = export("f16")
    request = VerifyRequest(
        right.path, right.source, 8.0, texts=TEXT, llamacpp=LlamaCppOptions(threads=1)
    )
    link = verify(request).link(LinkName.ROPE)
    assert link.status is Status.INCONCLUSIVE
    assert link.summary == (
        "imposing the wrong factor 8 for 8 moved the logits by 0, and up to 0 counts as equal:"
        " this model cannot tell a wrong factor from the right one"
    )
