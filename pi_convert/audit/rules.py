"""The audit of a GGUF's header: every rule in order, and what each says where nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.containers.gguf import GgufFile, read_gguf_file
from converters.errors import SourceError, UnsupportedError
from converters.rope import gguf as spelling
from pi_convert.audit import (
    context_rules,
    llamacpp,
    rope_rules,
    tensor_rules,
    tokenizer_keys,
    tokenizer_rules,
)
from pi_convert.audit.findings import Audit, Finding, Severity, note, wrong
from pi_convert.audit.header import Header


@dataclass(frozen=True, slots=True)
class Rule:
    """``check`` yields what is not right; where that is nothing, ``right`` says what is."""

    id: str
    check: Callable[[Header], Iterator[Finding]]
    right: Callable[[Header], str]


def audit_path(path: Path) -> Audit:
    """The audit of a file; one that cannot be read has that as its only finding."""
    try:
        file = read_gguf_file(path)
    except (SourceError, UnsupportedError) as error:
        unreadable = wrong("file.readable", error.message, "a whole GGUF", error.hint)
        return Audit(str(path), "", (unreadable,))
    return audit_gguf(file)


def audit_gguf(file: GgufFile) -> Audit:
    """Every finding about a GGUF's header, of any architecture; no weight is read."""
    try:
        header = Header.of(file)
    except SourceError as error:
        return Audit(
            str(file.path), "", (wrong("file.architecture", error.message, "a name", error.hint),)
        )
    findings = [finding for rule in RULES for finding in _apply(rule, header)]
    return Audit(str(file.path), header.architecture, tuple(findings))


def _apply(rule: Rule, header: Header) -> list[Finding]:
    findings = list(rule.check(header))
    if not findings and (sentence := rule.right(header)):
        findings = [Finding(rule.id, Severity.RIGHT, sentence)]
    return findings


def _scaling(header: Header) -> str:
    if header.architecture in llamacpp.WITHOUT_ROPE:
        return f"{header.architecture} has no RoPE"
    kind = header.scaling_type
    if header.applied_factor == 1.0:
        tensors = "longrope" if header.has_longrope_tensors else "rope_freqs"
        return (
            f"no factor, frequencies scaled by the {tensors} tensors"
            if header.has_longrope_tensors or header.has_factor_tensor
            else f"unscaled ({header.shown(spelling.TYPE_KEY)})"
        )
    return f"{kind}, factor {header.applied_factor:g}"


def _contexts(header: Header) -> str:
    context, original = header.whole(spelling.CONTEXT_KEY), header.whole(spelling.ORIGINAL_KEY)
    if header.applied_factor == 1.0 or original is None:
        return f"context_length {context}"
    return f"context_length {context} = L {original} x {header.applied_factor:g}"


def _theta(header: Header) -> str:
    return header.shown(spelling.THETA_KEY) if spelling.THETA_KEY in header.keys else ""


def _dimensions(header: Header) -> str:
    width, head = header.whole(spelling.DIMENSION_KEY), header.head_dim
    if head is None:
        return ""
    return f"{width or head} of {head} elements of a head are rotated"


def _arrays(header: Header) -> str:
    count = tokenizer_rules.length(header.file.keys.get(tokenizer_keys.TOKENS))
    return f"{count} tokens, arrays of one length"


def _pre(header: Header) -> str:
    if header.text(tokenizer_keys.MODEL) not in llamacpp.BPE_MODELS_WITH_PRE:
        return ""
    return f"{tokenizer_keys.PRE} = {header.text(tokenizer_keys.PRE)}"


def _file_type(header: Header) -> str:
    stated = header.file.keys.get(tensor_rules.FILE_TYPE)
    common = tensor_rules.dominating_type(header)
    return f"{tensor_rules.FILE_TYPE} = {stated}, most weights are {common}" if common else ""


def _complete(header: Header) -> str:
    count = len(header.file.tensors)
    if tensor_rules.described_architecture(header) is None:
        return f"{count} tensors; shapes of {header.architecture} are not described here"
    return f"all {count} tensors of the architecture, in shape"


def _factor_tensor(header: Header) -> str:
    if not header.has_factor_tensor:
        return ""
    rope = rope_rules.llama3_of(header)
    scaling = rope.llama3 if rope else None
    return f"rope_freqs.weight is llama3's, factor {scaling.factor:g}" if scaling else ""


def _known(header: Header) -> Iterator[Finding]:
    if header.architecture not in llamacpp.ARCHITECTURES:
        yield wrong(
            "file.architecture.unknown",
            f"general.architecture = {header.architecture}",
            f"one that llama.cpp {llamacpp.LLAMA_CPP_VERSION} knows: it refuses any other",
            "A newer llama.cpp may know it; else the file's maker misspelled it.",
        )


def _provenance(header: Header) -> Iterator[Finding]:
    if header.architecture not in llamacpp.WITHOUT_ROPE:
        yield note(
            "weights.order-unseen",
            "the order of query and key rows",
            "as llama.cpp rotates them, which a header cannot show",
            "pi-convert verify FILE --against SOURCE --scale S",
        )


RULES: tuple[Rule, ...] = (
    Rule("file.known", _known, lambda h: ""),
    Rule("keys.types", rope_rules.key_types, lambda h: "every loaded key has its type"),
    Rule("rope.scaling", rope_rules.scaling, _scaling),
    Rule("rope.use", rope_rules.use, lambda h: ""),
    Rule("rope.contexts", context_rules.contexts, _contexts),
    Rule("rope.theta", rope_rules.theta, _theta),
    Rule("rope.dimensions", rope_rules.dimensions, _dimensions),
    Rule("rope.attention-factor", rope_rules.attention_factor, lambda h: ""),
    Rule("rope.factors", rope_rules.factor_tensor, _factor_tensor),
    Rule("attention.window", context_rules.window, lambda h: ""),
    Rule("tokenizer.arrays", tokenizer_rules.arrays, _arrays),
    Rule("tokenizer.pre", tokenizer_rules.pre_tokenizer, _pre),
    Rule("tokenizer.ids", tokenizer_rules.special_tokens, lambda h: "special ids are in range"),
    Rule("tokenizer.chat-template", tokenizer_rules.chat_template, lambda h: "a chat template"),
    Rule("tensors.layout", tensor_rules.layout, lambda h: "tensors lie as ggml demands"),
    Rule("tensors.complete", tensor_rules.complete, _complete),
    Rule("tensors.file-type", tensor_rules.file_type, _file_type),
    Rule("metadata.paths", tensor_rules.local_paths, lambda h: "no local path"),
    Rule("weights.order", _provenance, lambda h: ""),
)
