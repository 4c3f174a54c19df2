"""What the artifact records of its source, held against the source that was given.

A difference is a note and no fault: a model may be renamed, or converted to another container on
its way here. Whether the weights are the source's is for link 2 to say.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from converters.content_hash import content_hash, tensor_hash
from converters.progress import Progress
from converters.targets.gguf.metadata import SOURCE_HASH_KEY, SOURCE_NAME_KEY
from pi_convert.runtimes.llamacpp import cores
from pi_convert.verify.request import Subject

_SHOWN_DIGITS = 12  # of a hash


@dataclass(frozen=True, slots=True)
class SourceNote:
    """Which source is recorded and which was given, in a sentence."""

    text: str
    same_weights: bool


def source_note(subject: Subject, progress: Progress) -> SourceNote | None:
    """None where the recorded and the given source agree, or none is recorded."""
    keys = subject.artifact.record
    name, digest = keys.get(SOURCE_NAME_KEY), keys.get(SOURCE_HASH_KEY)
    if name is None and digest is None:
        return None
    given, given_digest = subject.source.origin.label, _hash(subject, progress)
    if (name, digest) == (given, given_digest):
        return None
    same = digest == given_digest
    told = "the weights are the same"
    if not same:
        told = f"the weights have SHA-256 {_short(digest)} there and {_short(given_digest)} here"
    text = f"the file records the source {name!r}, --against is {given!r}: {told}"
    if name == given:
        text = f"the file records other weights of {name}: {told}; another --revision has them"
    return SourceNote(text, same)


def _hash(subject: Subject, progress: Progress) -> str:
    tensors = subject.source.tensors
    hashes = {}
    with ThreadPoolExecutor(cores()) as pool:
        jobs = pool.map(tensor_hash, tensors.values())
        for done, (name, digest) in enumerate(zip(tensors, jobs, strict=True), start=1):
            hashes[name] = digest
            progress("hashing the source", done, len(tensors))
    return content_hash(tensors, hashes)


def _short(digest: object) -> str:
    return f"{digest[:_SHOWN_DIGITS]}…" if isinstance(digest, str) else "not recorded"
