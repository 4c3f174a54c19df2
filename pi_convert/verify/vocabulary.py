"""Link 3: the artifact's tokenizer, as stored and as llama.cpp runs it."""

from __future__ import annotations

from collections.abc import Iterator

from converters.errors import ConvertError
from converters.progress import Progress
from converters.tokenizers import Vocabulary, vocabulary_from_gguf
from pi_convert.runtimes.llamacpp import LlamaCppTokenizer
from pi_convert.verify.request import Subject
from pi_convert.verify.tokenizer import Mismatch, TokenizerComparison, compare_tokenizers
from pi_convert.verify.tokenizer_reference import ReferenceEncoder
from pi_convert.verify.verdict import LinkName, LinkResult, Status

_SHOWN = 3


def verify_tokenizer(
    subject: Subject, reference: ReferenceEncoder, progress: Progress
) -> LinkResult:
    """Stored fields that change tokens, then ids on at least 100,000 tokens."""
    expected = subject.source.vocabulary
    progress("comparing token ids", 0, 1)
    try:
        stored = vocabulary_from_gguf(subject.artifact.file.keys, subject.artifact.path.name)
        with LlamaCppTokenizer(subject.artifact.path) as artifact:
            comparison = compare_tokenizers(
                artifact,
                reference,
                expected,
                [document.text for document in subject.request.documents()],
            )
            special = list(_special_findings(artifact.special_ids, stored, expected))
    except ConvertError as error:
        return LinkResult(LinkName.TOKENIZER, Status.FAILED, error.message, cause=error.message)
    progress("comparing token ids", 1, 1)
    return _result(comparison, stored, expected, special)


def _result(
    comparison: TokenizerComparison, stored: Vocabulary, expected: Vocabulary, special: list[str]
) -> LinkResult:
    splitting = list(_splitting_differences(stored, expected))
    notes = list(comparison.notes)
    findings = [*_token_differences(stored, expected), *special]
    if comparison.failures:
        findings = [*splitting, *findings]  # they say why the ids differ
        findings += [_sentence(mismatch) for mismatch in comparison.mismatches[:_SHOWN]]
    else:
        notes += [f"{difference}; the ids are the same" for difference in splitting]
    if stored.chat_template is None and expected.chat_template is not None:
        notes.append("the source's chat template is missing")
    measures: dict[str, float | int | str] = {
        "tokens compared": comparison.tokens,
        "texts": sum(comparison.cases.values()),
        "texts that differ": sum(comparison.failures.values()),
        "oracle": comparison.oracle,
    }
    summary = f"the same ids as {comparison.oracle} on {comparison.tokens:,} tokens"
    status = Status.PASSED
    if findings:
        status, summary = Status.FAILED, findings[0]
    elif not comparison.ok:
        status = Status.INCONCLUSIVE
        summary = f"only {comparison.tokens:,} tokens were compared"
    return LinkResult(
        LinkName.TOKENIZER,
        status,
        summary,
        measures,
        cause=findings[0] if findings else None,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _special_findings(
    resolved: dict[str, int], stored: Vocabulary, expected: Vocabulary
) -> Iterator[str]:
    """Special ids that are other ones; they matter where no text shows them."""
    for name, token_id in expected.special_ids.items():
        found = resolved.get(name) if name in ("bos", "eos") else stored.special_ids.get(name)
        if found is not None and found != token_id:
            yield f"the {name} token is {found}, the source's is {token_id}"
    for name in ("eot", "eom"):  # llama.cpp ends a generation at them
        if name in stored.special_ids and name not in expected.special_ids:
            yield f"the {name} token is {stored.special_ids[name]}, the source has none"
    for name in ("add_bos", "add_eos"):
        found_flag, expected_flag = getattr(stored, name), getattr(expected, name)
        if None not in (found_flag, expected_flag) and found_flag != expected_flag:
            yield f"{name} is {found_flag}, the source's is {expected_flag}"
    if stored.chat_template != expected.chat_template and stored.chat_template is not None:
        yield "the chat template is not the source's"


def _splitting_differences(stored: Vocabulary, expected: Vocabulary) -> Iterator[str]:
    """What cuts text otherwise, unless two names stand for one thing."""
    if stored.pre != expected.pre:
        yield f"tokenizer.ggml.pre is {stored.pre}, expected {expected.pre}"
    if stored.merges != expected.merges:
        yield "the merges are not the source's"
    if stored.scores != expected.scores:
        yield "the scores are not the source's"


def _token_differences(stored: Vocabulary, expected: Vocabulary) -> Iterator[str]:
    """What makes an id another token, in a text that shows it or not."""
    if stored.kind is not expected.kind:
        yield f"the tokenizer is {stored.kind.value}, the source's is {expected.kind.value}"
    if (at := _first_difference(stored.tokens, expected.tokens)) is not None:
        yield f"token {at} is {stored.tokens[at]!r}, the source's is {expected.tokens[at]!r}"
    if (at := _first_difference(stored.types, expected.types)) is not None:
        yield f"token {at} is of type {stored.types[at].name}, expected {expected.types[at].name}"


def _first_difference(a: tuple[object, ...], b: tuple[object, ...]) -> int | None:
    """Where two tuples first differ, as far as both go: a shorter one is padded in a GGUF."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def _sentence(mismatch: Mismatch) -> str:
    return (
        f"{mismatch.text} ({mismatch.group}) gives {list(mismatch.found)},"
        f" expected {list(mismatch.expected)}"
    )
