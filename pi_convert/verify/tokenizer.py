"""Link 3 of the proof: the artifact's tokenizer in its own runtime gives the source's ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from converters.tokenizers import Vocabulary
from pi_convert.verify.tokenizer_reference import ReferenceEncoder
from pi_convert.verify.tokenizer_texts import Case, cases, chat_cases, random_unicode

MINIMUM_TOKENS = 100_000  # identical ids on fewer prove less than the link promises
UNICODE_TOKENS = 20_000  # of them at least, from random Unicode
_SHOWN_MISMATCHES = 10
_SHOWN_IDS = 12  # ids around the first difference
_SHOWN_CHARS = 80

_QUESTION = "What is 12,345 + 67? Explain like I'm five.\n\n  Use   spaces. 日本語も"
_ANSWER = "It's 12,412.\n```python\nprint(12345 + 67)\n```"


class Encoder(Protocol):
    """A tokenizer, as text to ids."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids; ``add_special`` adds BOS/EOS, ``parse_special`` reads special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One text with different ids; both lists from shortly before the first difference."""

    group: str
    text: str  # repr, shortened
    add_special: bool
    parse_special: bool
    position: int  # of the first difference
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizerComparison:
    """What the comparison saw."""

    oracle: str
    tokens: int
    cases: Mapping[str, int]  # by group
    failures: Mapping[str, int]  # by group
    mismatches: tuple[Mismatch, ...]  # the first ones
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Identical ids on enough tokens."""
        return not self.failures and self.tokens >= MINIMUM_TOKENS


def compare_tokenizers(
    artifact: Encoder,
    reference: ReferenceEncoder,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    seed: int = 0,
) -> TokenizerComparison:
    """Compares ids on at least ``MINIMUM_TOKENS`` tokens, the same texts for the same seed.

    ``vocabulary`` is the source's: its added tokens and chat template are tried.
    """
    chats, notes = _rendered_chats(vocabulary)
    fixed = chain(cases(vocabulary, texts, seed=seed), chat_cases(chats))
    tokens, unicode_tokens = 0, 0
    count: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    mismatches: list[Mismatch] = []
    for case in chain(fixed, random_unicode(seed=seed)):
        enough = tokens >= MINIMUM_TOKENS and unicode_tokens >= UNICODE_TOKENS
        if enough and case.group == "unicode":
            break
        text, expected, found = _both(case, artifact, reference)
        count[case.group] += 1
        tokens += len(expected)
        unicode_tokens += len(expected) if case.group == "unicode" else 0
        if found != expected:
            failures[case.group] += 1
            if len(mismatches) < _SHOWN_MISMATCHES:
                mismatches.append(_mismatch(case, text, expected, found))
    return TokenizerComparison(
        oracle=reference.oracle,
        tokens=tokens,
        cases=dict(count),
        failures=dict(failures),
        mismatches=tuple(mismatches),
        notes=(*reference.notes, *notes),
    )


def _both(
    case: Case, artifact: Encoder, reference: ReferenceEncoder
) -> tuple[str, list[int], list[int]]:
    """The text as both are given it, the ids expected and the ids found."""
    text = reference.prepare(case.text)
    flags = {"add_special": case.add_special, "parse_special": case.parse_special}
    return text, reference.encode(text, **flags), artifact.encode(text, **flags)


def _mismatch(case: Case, text: str, expected: list[int], found: list[int]) -> Mismatch:
    pairs = enumerate(zip(expected, found, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    window = slice(max(0, position - 2), max(0, position - 2) + _SHOWN_IDS)
    shown = repr(text)
    return Mismatch(
        group=case.group,
        text=shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 1] + "…",
        add_special=case.add_special,
        parse_special=case.parse_special,
        position=position,
        expected=tuple(expected[window]),
        found=tuple(found[window]),
    )


def _rendered_chats(vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Each chat template on a short talk, and a note for one that cannot be rendered."""
    templates = dict(vocabulary.chat_templates)
    if vocabulary.chat_template is not None:
        templates = {"default": vocabulary.chat_template, **templates}
    rendered, notes = [], []
    for name, template in templates.items():
        texts = list(_renderings(template, vocabulary))
        rendered += texts
        if not texts:
            notes.append(f"chat template {name!r} takes no plain talk: not rendered")
    return rendered, notes


def _renderings(template: str, vocabulary: Vocabulary) -> Iterator[str]:
    """The template with and without a system message, where it takes them."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: "24 Nov 2026"
    special = {
        f"{name}_token": vocabulary.tokens[vocabulary.special_ids[name]]
        for name in ("bos", "eos")
        if name in vocabulary.special_ids
    }
    talk = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": "Thanks!"},
    ]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
        values: dict[str, Any] = {"messages": messages, "add_generation_prompt": True, **special}
        try:
            yield environment.from_string(template).render(values)
        except (TemplateError, TypeError, ValueError):
            continue  # the template refuses such a talk; the caller says so when it refuses all
