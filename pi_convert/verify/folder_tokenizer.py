"""Link 3 of a folder: its tokenizer.json in ``tokenizers``, as its clients load it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.containers.onnx import companion_folder
from converters.errors import ConvertError, SourceError
from converters.progress import Progress
from pi_convert.runtimes.llamacpp import LlamaCppTokenizer
from pi_convert.verify.onnx_artifact import OnnxArtifact
from pi_convert.verify.request import Subject
from pi_convert.verify.tokenizer import Encoder, TokenizerComparison, compare_tokenizers
from pi_convert.verify.tokenizer_reference import ReferenceEncoder
from pi_convert.verify.verdict import LinkName, LinkResult, Status
from pi_convert.verify.vocabulary import mismatch_sentence

_SHOWN = 3
_TOKENIZER, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_ID_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """A tokenizer.json as it is."""

    _backend: Any

    @classmethod
    def of(cls, content: str) -> FolderTokenizer:
        """Raises ``SourceError`` where ``tokenizers`` refuses it."""
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(content))
        except Exception as error:  # tokenizers raises Exception itself
            raise SourceError(
                f"{_TOKENIZER} cannot be read: {error}", hint="Export the folder again."
            ) from error

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``."""
        self._backend.encode_special_tokens = not parse_special
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids


def verify_folder_tokenizer(
    subject: Subject, artifact: OnnxArtifact, reference: ReferenceEncoder, progress: Progress
) -> LinkResult:
    """Ids on at least 100,000 tokens against the source's tokenizer, template and special ids.

    The oracle is the source's: llama.cpp where it is a GGUF, its own files else.
    """
    folder = companion_folder(artifact.path)
    if not (folder / _TOKENIZER).is_file():
        reason = f"{folder.name} has no {_TOKENIZER}"
        return LinkResult(LinkName.TOKENIZER, Status.FAILED, reason, cause=reason)
    progress("comparing token ids", 0, 1)
    try:
        with ExitStack() as stack:
            comparison = compare_tokenizers(
                FolderTokenizer.of((folder / _TOKENIZER).read_text("utf-8")),
                _oracle(subject, reference, stack),
                subject.source.vocabulary,
                [document.text for document in subject.request.documents()],
            )
    except ConvertError as error:
        return LinkResult(LinkName.TOKENIZER, Status.FAILED, error.message, cause=error.message)
    progress("comparing token ids", 1, 1)
    return _result(comparison, [*_differences(subject, folder)])


def _oracle(subject: Subject, reference: ReferenceEncoder, stack: ExitStack) -> ReferenceEncoder:
    """What the source's own runtime makes of a text."""
    origin, files = subject.source.origin, subject.source.vocabulary.files
    if origin.kind == "gguf":
        tokenizer = stack.enter_context(LlamaCppTokenizer(origin.path))
        prepare = reference.prepare
        return ReferenceEncoder("llama.cpp", reference.notes, _positional(tokenizer), prepare)
    if _TOKENIZER in files:
        own = FolderTokenizer.of(files[_TOKENIZER].decode())
        return ReferenceEncoder("tokenizers", (), _positional(own))
    return reference


def _positional(encoder: Encoder) -> Callable[[str, bool, bool], list[int]]:
    def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
        return encoder.encode(text, add_special=add_special, parse_special=parse_special)

    return encode


def _differences(subject: Subject, folder: Path) -> Iterator[str]:
    """Special ids and the chat template, which no text shows."""
    vocabulary = subject.source.vocabulary
    for name in _ID_FILES:
        values = _read(folder / name)
        for special, key in (("bos", "bos_token_id"), ("eos", "eos_token_id")):
            want, found = vocabulary.special_ids.get(special), values.get(key)
            listed = found if isinstance(found, list) else [found]
            if found is not None and want is not None and want not in listed:
                yield f"{name}: {key} is {found}, the source's is {want}"
    template = _read(folder / _SETTINGS).get("chat_template")
    if template is None and (folder / _TEMPLATE).is_file():
        template = (folder / _TEMPLATE).read_text("utf-8")
    wanted = vocabulary.chat_template
    if isinstance(template, str | None) and template != wanted:
        lost = "is missing" if template is None else "is not the source's"
        yield f"the chat template {lost}"


def _read(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _result(comparison: TokenizerComparison, findings: list[str]) -> LinkResult:
    findings += [mismatch_sentence(mismatch) for mismatch in comparison.mismatches[:_SHOWN]]
    status = Status.PASSED
    summary = f"the same ids as {comparison.oracle} on {comparison.tokens:,} tokens"
    if findings:
        status, summary = Status.FAILED, findings[0]
    elif not comparison.ok:
        status = Status.INCONCLUSIVE
        summary = f"only {comparison.tokens:,} tokens were compared"
    measures: dict[str, float | int | str] = {
        "tokens compared": comparison.tokens,
        "texts": sum(comparison.cases.values()),
        "texts that differ": sum(comparison.failures.values()),
        "oracle": comparison.oracle,
    }
    return LinkResult(
        LinkName.TOKENIZER,
        status,
        summary,
        measures,
        cause=findings[0] if findings else None,
        findings=tuple(findings),
        notes=comparison.notes,
    )
