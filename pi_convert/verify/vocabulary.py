"""Link 3: the artifact's tokenizer, as stored and as llama.cpp runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
        stored = vocabulary_from_gguf(subject.artifact.record, subject.artifact.path.name)
        with LlamaCppTokenizer(subject.artifact.path) as artifact:
            comparison = compare_tokenizers(
                artifact,
                reference,
                expected,
                [document.text for document in subject.request.documents()],
            )
            fields = list(_field_differences(subject, stored, artifact.special_ids))
    except ConvertError as error:
        return LinkResult(LinkName.TOKENIZER, Status.FAILED, error.message, cause=error.message)
    progress("comparing token ids", 1, 1)
    ours = subject.artifact.is_ours
    findings = [field.text for field in fields if ours or not field.harmless]
    notes = [field.text for field in fields if field.harmless and not ours]
    result = _result(comparison, stored, expected, findings)
    return dataclasses.replace(result, notes=(*result.notes, *notes))


def _result(
    comparison: TokenizerComparison, stored: Vocabulary, expected: Vocabulary, special: list[str]
) -> LinkResult:
    splitting = list(_splitting_differences(stored, expected))
    notes = list(comparison.notes)
    findings = [*_token_differences(stored, expected), *special]
    if comparison.failures:
        findings = [*splitting, *findings]  # they say why the ids differ
        findings += [mismatch_sentence(mismatch) for mismatch in comparison.mismatches[:_SHOWN]]
    else:
        notes += [f"{difference}; the ids are the same" for difference in splitting]
    if stored.chat_template is None and expected.chat_template is not None:
        notes.append("no chat template, where the source has one")
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


@dataclass(frozen=True, slots=True)
class _Difference:
    """A stored field that no text shows, and is not the source's."""

    text: str
    harmless: bool  # in another tool's file, which may leave it out


def _field_differences(
    subject: Subject, stored: Vocabulary, resolved: Mapping[str, int]
) -> Iterator[_Difference]:
    """Special ids, flags and chat templates, both ways; ``resolved`` is llama.cpp's ids."""
    expected, ours = subject.source.vocabulary, subject.artifact.is_ours
    for name in dict.fromkeys((*expected.special_ids, *stored.special_ids)):
        found, want = stored.special_ids.get(name), expected.special_ids.get(name)
        if name in ("bos", "eos") and want is not None and not ours:
            found = resolved.get(name)  # llama.cpp has defaults for them
        if found != want:
            # llama.cpp ends a generation at these, so one too many is no small thing.
            ends = want is None and name in ("eot", "eom")
            yield _Difference(
                f"the {name} token is {_or_none(found)}, the source's is {_or_none(want)}",
                harmless=None in (found, want) and not ends,
            )
    for name in ("add_bos", "add_eos"):
        flag, expected_flag = getattr(stored, name), getattr(expected, name)
        if flag != expected_flag:
            yield _Difference(
                f"{name} is {_or_none(flag)}, the source's is {_or_none(expected_flag)}",
                harmless=None in (flag, expected_flag),
            )
    templates, wanted = _templates(stored), _templates(expected)
    for title in dict.fromkeys((*wanted, *templates)):
        template, want_template = templates.get(title), wanted.get(title)
        if template != want_template:
            named = "the chat template" if title is None else f"the chat template {title!r}"
            lost = "is missing" if template is None else "is not the source's"
            yield _Difference(f"{named} {lost}", harmless=template is None)


def _templates(vocabulary: Vocabulary) -> dict[str | None, str | None]:
    """Chat templates by name; the default one has none."""
    templates: dict[str | None, str | None] = {None: vocabulary.chat_template}
    templates.update(vocabulary.chat_templates)
    return templates


def _or_none(value: object) -> object:
    return "none" if value is None else value


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


def mismatch_sentence(mismatch: Mismatch) -> str:
    """A text whose ids differ, with both lists."""
    return (
        f"{mismatch.text} ({mismatch.group}) gives {list(mismatch.found)},"
        f" expected {list(mismatch.expected)}"
    )
