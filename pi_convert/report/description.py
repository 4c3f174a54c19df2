"""A description as text and JSON."""

from __future__ import annotations

from math import isfinite

from pi_convert.audit.description import Description, RopeSummary, TokenizerSummary
from pi_convert.audit.header import plain
from pi_convert.report.console import pairs, size, table, tokens
from pi_convert.report.rope import factor_text

SCHEMA_VERSION = 1


def description_text(description: Description) -> str:
    """What the model is, a line a fact; how L and L' were told below them."""
    about = {
        "architecture": description.architecture,
        "name": description.name or "-",
        "license": description.license or "-",
        "parameters": f"{description.parameters:,}",
        "size": _sizes(description),
    }
    parts = [f"{description.label} ({description.container})", pairs(about)]
    parts.append(_rope_text(description.rope) if description.rope else "RoPE: none")
    parts.append(_cache_text(description))
    parts.append("Tensors\n" + _tensor_table(description))
    parts.append(_tokenizer_text(description.tokenizer))
    if description.record:
        record = {key: str(value) for key, value in description.record.items()}
        parts.append("Recorded by pi-convert\n" + pairs(record))
    parts.extend(f"note: {note}" for note in description.notes)
    return "\n\n".join(part for part in parts if part)


def _sizes(description: Description) -> str:
    weights = f"{size(description.size_bytes)} of weights"
    if description.file_bytes is None:
        return weights
    return f"{size(description.file_bytes)} ({description.file_bytes:,} bytes), {weights}"


def _rope_text(rope: RopeSummary) -> str:
    facts = {
        "kind": rope.kind,
        "effective factor": factor_text(rope.factor),
        "theta": f"{rope.theta:,.15g}",
        "rotated": "-" if rope.rotary_dim is None else f"{rope.rotary_dim} elements of a head",
        "L": _context(rope.original_context),
        "L'": _context(rope.context),
    }
    if rope.attention_factor != 1.0:
        facts["attention factor"] = factor_text(rope.attention_factor)
    for evidence in rope.evidence:
        told = f"from {evidence.sentence}{' (assumption)' if evidence.assumed else ''}"
        facts[evidence.name] = f"{facts.get(evidence.name, ''):<12} {told}"
    return "RoPE\n" + pairs(facts)


def _context(context_tokens: int | None) -> str:
    return "not told" if context_tokens is None else f"{tokens(context_tokens)} tokens"


def _cache_text(description: Description) -> str:
    facts = {
        f"{tokens(context)} tokens": size(cache_bytes)
        for context, cache_bytes in description.kv_cache_bytes.items()
    }
    if description.sliding_window:
        facts["attention window"] = f"{tokens(description.sliding_window)} tokens"
    return f"KV cache in {description.cache_type}\n" + pairs(facts) if facts else ""


def _tensor_table(description: Description) -> str:
    rows = [
        [group.encoding, f"{group.count:>7,}", f"{group.elements:>15,}", size(group.size_bytes)]
        for group in description.tensors
    ]
    return table(rows, header=("type", "tensors", f"{'elements':>15}", "size"))


def _tokenizer_text(tokenizer: TokenizerSummary | None) -> str:
    if tokenizer is None:
        return "Tokenizer: none"
    ids = ", ".join(f"{name} {value}" for name, value in tokenizer.special_ids.items())
    facts = {
        "kind": tokenizer.kind,
        "pre-tokenizer": tokenizer.pre or "-",
        "tokens": f"{tokenizer.size:,}",
        "special ids": ids or "-",
        "adds BOS, EOS": f"{_said(tokenizer.add_bos)}, {_said(tokenizer.add_eos)}",
        "chat template": "yes" if tokenizer.has_chat_template else "no",
    }
    return "Tokenizer\n" + pairs(facts)


def _said(flag: bool | None) -> str:
    return "not stated" if flag is None else "yes" if flag else "no"


def description_json(description: Description) -> dict[str, object]:
    """The same for machines; ``schema_version`` changes when a field does."""
    return {
        "schema_version": SCHEMA_VERSION,
        "label": description.label,
        "container": description.container,
        "architecture": description.architecture,
        "name": description.name,
        "license": description.license,
        "parameters": description.parameters,
        "size_bytes": description.size_bytes,
        "file_bytes": description.file_bytes,
        "rope": None if description.rope is None else _rope_json(description.rope),
        "tensors": [
            {
                "type": group.encoding,
                "count": group.count,
                "elements": group.elements,
                "size_bytes": group.size_bytes,
            }
            for group in description.tensors
        ],
        "tokenizer": _tokenizer_json(description.tokenizer),
        "kv_cache_bytes": [
            {"context": context, "size_bytes": cache_bytes}
            for context, cache_bytes in description.kv_cache_bytes.items()
        ],
        "kv_cache_type": description.cache_type,
        "sliding_window": description.sliding_window,
        "record": {
            key: plain(value) if isinstance(value, float) and not isfinite(value) else value
            for key, value in description.record.items()
        },
        "notes": list(description.notes),
    }


def _rope_json(rope: RopeSummary) -> dict[str, object]:
    return {
        "kind": rope.kind,
        "factor": rope.factor,
        "theta": rope.theta,
        "rotary_dim": rope.rotary_dim,
        "original_context": rope.original_context,
        "context": rope.context,
        "attention_factor": rope.attention_factor,
        "evidence": [
            {"name": e.name, "told_by": e.sentence, "assumed": e.assumed} for e in rope.evidence
        ],
    }


def _tokenizer_json(tokenizer: TokenizerSummary | None) -> dict[str, object] | None:
    if tokenizer is None:
        return None
    return {
        "kind": tokenizer.kind,
        "pre": tokenizer.pre,
        "size": tokenizer.size,
        "special_ids": dict(tokenizer.special_ids),
        "add_bos": tokenizer.add_bos,
        "add_eos": tokenizer.add_eos,
        "has_chat_template": tokenizer.has_chat_template,
    }
