"""JSON that means one thing: no duplicate keys, no NaN, an object at the top."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from converters.errors import SourceError, os_hint

# The largest are tokenizer.json and shard indices: tens of MB.
MAX_JSON_BYTES = 256 << 20
_MAX_DEPTH = 64  # tokenizer.json has about 10
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json_object(data: bytes, where: str) -> dict[str, object]:
    """The object that ``data`` spells. Raises ``SourceError`` for anything but one clear object."""
    hint = "The file is damaged or was edited by hand; correct it or fetch it again."

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = sorted(name for name, count in counts.items() if count > 1)
            raise SourceError(f"{where}: {', '.join(repeated[:8])} stands twice", hint=hint)
        return found

    def not_a_number(constant: str) -> object:
        raise SourceError(f"{where}: {constant} is no JSON number", hint=hint)

    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=unique, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SourceError(f"{where}: expected a JSON object, found a {kind}", hint=hint)
    if _is_deeper_than(_MAX_DEPTH, value):
        raise SourceError(f"{where}: nested deeper than {_MAX_DEPTH} levels", hint=hint)
    if _SURROGATE.search(text) and not _is_unicode(value):
        raise SourceError(f"{where}: half of a surrogate pair stands in a text", hint=hint)
    return value


def _is_unicode(value: object) -> bool:
    """Whether every text can be written as UTF-8, which half of a pair in escapes cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deeper_than(depth: int, value: object) -> bool:
    """Level by level, since what reads the value later recurses and this must not."""
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file; ``SourceError`` where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise SourceError(f"{path}: {size} bytes", hint=f"Expected at most {MAX_JSON_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"{path}: {error.strerror}", hint=os_hint(error, "Check the path.")
        ) from error
    return parse_json_object(data, str(path))
