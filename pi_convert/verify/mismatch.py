"""Names what a wrong tensor is: another tensor, other rows, or single elements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from converters.encodings import F16, decode_f32
from converters.errors import UnsupportedError
from converters.tensor import Tensor
from converters.transforms import deinterleave_rope, interleave_rope
from pi_convert.verify.encode import encode
from pi_convert.verify.request import Subject

Values = npt.NDArray[np.float32]

# Relative root mean square error below which rows are the same rows quantized: 2-bit types come to
# 0.4 on normal values, two unrelated rows to 1.4.
_ALIKE = 0.6
_SAMPLE_ROWS = 16
_FEW = 100  # one row in so many is a local fault
_ELEMENTS = 1 << 22  # of one tensor in memory at once while a cause is looked for


def name_cause(subject: Subject, name: str, differing_rows: int, first_row: int) -> str:
    """One sentence on why the artifact's ``name`` is not the source's."""
    try:
        return _cause(subject, name, differing_rows, first_row)
    except UnsupportedError:  # gguf-py cannot decode it: its bytes differ, and that is all
        return f"{name} is not the source's: {differing_rows} rows differ"


def _cause(subject: Subject, name: str, differing_rows: int, first_row: int) -> str:
    found, source = subject.artifact.tensors[name], subject.source.tensors[name]
    few = len(found.shape) > 1 and differing_rows <= max(1, found.rows // _FEW)
    if few or (len(found.shape) > 1 and _alike(found, source)):
        return _elements(found, source, differing_rows, first_row)
    for reason in (_permutation, _other_tensor, _head_order):
        sentence = reason(subject, found, source)
        if sentence is not None:
            return f"{name} {sentence}"
    if len(found.shape) == 1:
        return _elements(found, source, differing_rows, first_row)
    return f"{name} is not the source's: {differing_rows} of {found.rows} rows differ"


def _elements(found: Tensor, source: Tensor, rows: int, first: int) -> str:
    if found.encoding.is_float:
        if not np.isfinite(found.read_f32(first, first + 1)).all():
            limit = "; float16 ends at 65,504" if found.encoding is F16 else ""
            return f"{found.name} has values that are not finite, first in row {first}{limit}"
        expected = encode(source.read_f32(first, first + 1), found.encoding)
        a, b = found.read_f32(first, first + 1)[0], decode_f32(expected, found.encoding)[0]
        (columns,) = np.nonzero(a != b)
        if rows == 1 and len(columns) == 1:
            at = int(columns[0])
            return (
                f"{found.name} differs in one element, row {first}, column {at}:"
                f" {a[at]:.8g}, expected {b[at]:.8g}"
            )
    return f"{found.name} differs in {rows} of {found.rows} rows, first row {first}"


def _permutation(subject: Subject, found: Tensor, source: Tensor) -> str | None:
    """Whether rows are in the order of the other RoPE pairing."""
    parts = found.name.split(".")
    heads = {"q_proj": subject.source.hparams.heads, "k_proj": subject.source.hparams.kv_heads}
    count = heads.get(parts[-2] if len(parts) > 1 else "", 0)
    if not count:
        return None
    if subject.artifact.keeps_row_order:
        turned = _alike(deinterleave_rope(found, count), source)
        return "has its rows interleaved, as llama.cpp alone wants them" if turned else None
    interleaved = subject.source.architecture.rope_pairing == "interleaved"
    # ``found`` was put back into Hugging Face's order; this is what the file itself has.
    stored = interleave_rope(found, count) if interleaved else deinterleave_rope(found, count)
    if not _alike(stored, source):
        return None
    if interleaved:
        return "is in Hugging Face's row order: q and k were not permuted for llama.cpp"
    return "is permuted, which this architecture must not be"


def _other_tensor(subject: Subject, found: Tensor, source: Tensor) -> str | None:
    layouts = [found, *_row_orders(subject, found)]
    for other in subject.source.tensors.values():
        if other.name == source.name or other.shape != found.shape:
            continue
        # Norms are all near 1 and so near each other: those only by every bit.
        if len(found.shape) == 1:
            same = _equal(found, other)
        else:
            same = any(_alike(layout, other) for layout in layouts)
        if same:
            return f"holds {other.name}"
    return None


def _row_orders(subject: Subject, found: Tensor) -> list[Tensor]:
    """A projection's rows in the other orders RoPE knows: k's rows where v's belong are in one."""
    sizes = subject.source.hparams
    heads = {sizes.query_size: sizes.heads, sizes.kv_size: sizes.kv_heads}.get(found.shape[0])
    if heads is None or "self_attn" not in found.name or len(found.shape) != 2:
        return []
    return [interleave_rope(found, heads), deinterleave_rope(found, heads)]


def _head_order(subject: Subject, found: Tensor, source: Tensor) -> str | None:
    """Whether it has the source's heads in another order."""
    head_dim = subject.source.hparams.head_dim
    if "self_attn" not in found.name or found.rows % head_dim or len(found.shape) != 2:
        return None
    if found.elements > _ELEMENTS:
        return None
    heads = found.rows // head_dim
    a = found.read_f32(0, found.rows).reshape(heads, -1)
    b = source.read_f32(0, source.rows).reshape(heads, -1)
    order = [next((j for j in range(heads) if _near(a[i], b[j])), -1) for i in range(heads)]
    if sorted(order) != list(range(heads)):
        return None
    moved = [i for i, j in enumerate(order) if i != j]
    return f"has its heads in another order: {', '.join(map(str, moved))} are swapped"


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether sampled rows hold the same numbers up to quantization."""
    count = min(_SAMPLE_ROWS, a.rows)
    rows = np.unique(np.linspace(0, a.rows - 1, count).astype(int))
    take: Callable[[Tensor], Values] = lambda t: np.concatenate(  # noqa: E731
        [t.read_f32(int(row), int(row) + 1) for row in rows]
    )
    return _near(take(a), take(b))


def _equal(a: Tensor, b: Tensor) -> bool:
    return np.array_equal(a.read_f32(0, a.rows), b.read_f32(0, b.rows))


def _near(a: Values, b: Values) -> bool:
    scale = float(np.sqrt(np.mean(np.square(b, dtype=np.float64))))
    error = float(np.sqrt(np.mean(np.square(a - b, dtype=np.float64))))
    return bool(np.isfinite(error)) and error < _ALIKE * max(scale, 1e-30)
