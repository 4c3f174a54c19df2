"""JSON that means one thing: no duplicate keys, no NaN, an object at the top."""

from __future__ import annotations

import json
from pathlib import Path

from converters.errors import SourceError

# The largest are tokenizer.json and shard indices: tens of MB.
MAX_JSON_BYTES = 256 << 20


def parse_json_object(data: bytes, where: str) -> dict[str, object]:
    """The object that ``data`` spells. Raises ``SourceError`` for anything but one clear object."""
    hint = "The file is damaged or was edited by hand; correct it or fetch it again."

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise SourceError(f"{where}: {', '.join(repeated)} stands twice", hint=hint)
        return found

    def not_a_number(constant: str) -> object:
        raise SourceError(f"{where}: {constant} is no JSON number", hint=hint)

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SourceError(f"{where}: expected a JSON object, found a {kind}", hint=hint)
    return value


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file; ``SourceError`` where it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise SourceError(f"{path}: {size} bytes", hint=f"Expected at most {MAX_JSON_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint="Check the path.") from error
    return parse_json_object(data, str(path))
