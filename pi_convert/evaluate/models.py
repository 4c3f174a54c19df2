"""A model to measure, whichever format it has and whichever runtime runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from converters.errors import EnvironmentNotReadyError, SourceError, UnsupportedError
from converters.progress import Progress, silent
from pi_convert.evaluate.texts import Document
from pi_convert.evaluate.windows import Encode, TokenStream
from pi_convert.runtimes.base import Closing, Runtime, Tokens

_MEMORY_SHARE = 0.9  # of what is free; the rest is left to compute buffers and other programs


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model costs to run. ``attention_width`` is layers x heads x head_dim."""

    parameters: int  # that every token is multiplied with, the embedding left out
    attention_width: int
    weight_bytes: int  # in memory
    cache_bytes: int  # keys and values, a token


@dataclass(frozen=True, slots=True)
class Model:
    """A model as measurements need it; no weight is read before ``load``.

    ``original_context`` is L and ``context`` L' in tokens, None where the file does not say;
    ``held_context`` is how many positions it can be run over at all, None for any number.
    """

    label: str
    runtime: str
    original_context: int | None
    context: int | None
    held_context: int | None
    encode: Encode  # without special tokens
    bos: tuple[int, ...]  # what is put before a prompt
    sizes: Sizes
    load: Callable[[Progress], Runtime]

    @property
    def name(self) -> str:
        """Label and runtime, which tell it from every other in one report."""
        return f"{self.label} in {self.runtime}"


def require_context(
    model: Model, context_tokens: int, *, free_bytes: int, beyond: bool = False
) -> None:
    """Refuses a window of ``context_tokens`` that the model or this machine cannot hold.

    ``beyond`` allows windows past L', which is extrapolation. Raises ``UnsupportedError`` and
    ``EnvironmentNotReadyError``.
    """
    held, trained = model.held_context, model.context
    if held is not None and context_tokens > held:
        raise UnsupportedError(
            f"{model.label} holds positions for {held:,} tokens, and {context_tokens:,} were asked",
            hint="Give smaller contexts, or export it with a larger --scale.",
        )
    if trained is not None and context_tokens > trained and not beyond:
        raise UnsupportedError(
            f"{context_tokens:,} tokens are past the context of {model.label}, which is"
            f" {trained:,} (L')",
            hint="Ask for fewer tokens, interpolate a model that torch runs with --scale, or give"
            " --extrapolate to see what happens past L'.",
        )
    require_memory([model], context_tokens, free_bytes=free_bytes)


def require_memory(models: Sequence[Model], context_tokens: int, *, free_bytes: int) -> None:
    """Raises ``EnvironmentNotReadyError`` where memory does not hold all of them at once."""
    from pi_convert.evaluate.wording import gib

    needed = sum(m.sizes.weight_bytes + m.sizes.cache_bytes * context_tokens for m in models)
    if needed > _MEMORY_SHARE * free_bytes:
        names = " and ".join(model.label for model in models)
        verb = "need" if len(models) > 1 else "needs"
        raise EnvironmentNotReadyError(
            f"{names} with {context_tokens:,} tokens {verb} {gib(needed)} of memory, and"
            f" {gib(free_bytes)} are free",
            hint="Give smaller contexts, a smaller --kv-cache-type, or free some memory.",
        )


def encode_all(model: Model, documents: Sequence[Document]) -> tuple[TokenStream, ...]:
    """Every document's tokens, one run each; their numbers are the documents' own."""
    runs = []
    for number, document in enumerate(documents):
        tokens = np.asarray(model.encode(document.text), dtype=np.int32)
        runs.append(TokenStream(tokens, np.full(len(tokens), number, dtype=np.int32)))
    return tuple(runs)


def one_text(documents: Sequence[Document]) -> Document:
    """All documents as one, without its last newline: what llama-perplexity reads of a file."""
    text = "".join(document.text for document in documents).removesuffix("\n")
    return Document(documents[0].name, text)


def encode_whole(model: Model, documents: Sequence[Document]) -> TokenStream:
    """The tokens of ``one_text``."""
    (run,) = encode_all(model, [one_text(documents)])
    return run


def require_same_tokens(
    models: Sequence[Model], documents: Sequence[Document]
) -> tuple[TokenStream, ...]:
    """The documents' tokens, which every model's own tokenizer has to give alike.

    Raises ``SourceError`` naming the first difference.
    """
    first = encode_all(models[0], documents)
    for other in models[1:]:
        for a, b, document in zip(first, encode_all(other, documents), documents, strict=True):
            if np.array_equal(a.tokens, b.tokens):
                continue
            count = min(len(a.tokens), len(b.tokens))
            (differing,) = np.nonzero(a.tokens[:count] != b.tokens[:count])
            at = int(differing[0]) if len(differing) else count
            raise SourceError(
                f"{models[0].label} and {other.label} split {document.name} into other tokens,"
                f" from token {at} on",
                hint="Only models with one tokenizer can be measured on the same tokens; measure"
                " them in commands of their own.",
            )
    return first


def require_vocabulary(model: Model, runtime: Runtime, tokens: Iterable[Tokens]) -> None:
    """Raises ``SourceError`` where a token has no row in the model's embedding."""
    largest = max(int(run.max(initial=0)) for run in tokens)
    if largest >= runtime.vocabulary:
        raise SourceError(
            f"{model.label}: its tokenizer gives token {largest}, its embedding has"
            f" {runtime.vocabulary} rows",
            hint="The tokenizer is another model's; put the right one beside the weights.",
        )


class Workbench(Closing):
    """Models in their runtimes, one in memory at a time."""

    def __init__(self, progress: Progress = silent) -> None:
        self._progress = progress
        self._current: tuple[Model, Runtime] | None = None

    def runtime(self, model: Model) -> Runtime:
        """The model loaded; another one's weights are freed first."""
        if self._current is not None and self._current[0] is model:
            return self._current[1]
        self.close()
        runtime = model.load(self._progress)
        self._current = (model, runtime)
        return runtime

    def close(self) -> None:
        """Frees the weights."""
        if self._current is not None:
            self._current[1].close()
            self._current = None
