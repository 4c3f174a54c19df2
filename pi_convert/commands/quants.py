"""``pi-convert quants``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import click

from pi_convert.commands.options import (
    json_option,
    model_argument,
    original_context_option,
    revision_option,
    scale_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from converters.targets.gguf import QuantizationOption

_UNBOUNDED = 1000  # columns where stdout is no terminal


@click.command()
@model_argument
@scale_option(
    required=False,
    help="The scale that the export will be asked for: what states it takes a few bytes too."
    " Default: 1.",
)
@original_context_option
@revision_option
@json_option
def command(
    model: str | None,
    scale: float | None,
    original_context: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """List every quantization type with its size for a model.

    Asked of the installed llama.cpp: bits per weight over the whole file, whether this model needs
    an importance matrix for the type (then `pi-convert export` refuses it), and the exact size of
    the file that an export with --scale S writes.
    """
    from converters.sources import open_checkpoint
    from converters.targets.gguf import quantization_types
    from pi_convert.defaults import resolve_model
    from pi_convert.report.console import emit, emit_json

    resolved = resolve_model(model)
    checkpoint = open_checkpoint(
        resolved.reference, revision=revision, original_context=original_context
    )
    scale = 1.0 if scale is None else scale
    options = quantization_types(checkpoint.interpolate(scale))
    if as_json:
        emit_json(_as_json(checkpoint.card.name, scale, options))
    else:
        emit(f"{resolved.announcement}\n{_as_text(options)}")


def _as_text(options: Sequence[QuantizationOption]) -> str:
    from pi_convert.report.console import size, table

    rows = [
        [
            option.name,
            f"{option.bits_per_weight:>11.2f}",
            "needed" if option.needs_importance_matrix else "-",
            f"{option.size_bytes:>16,}",
            f"{size(option.size_bytes):>10}",
            ", ".join(f"{count} {name}" for name, count in option.tensor_types.items()),
        ]
        for option in options
    ]
    header = ("type", "bits/weight", "imatrix", f"{'bytes':>16}", f"{'size':>10}", "tensors")
    text = table(rows, header=header)
    columns = shutil.get_terminal_size((_UNBOUNDED, 24)).columns
    if max(map(len, text.splitlines())) > columns:
        text = table([row[:-1] for row in rows], header=header[:-1])
    return text


def _as_json(name: str, scale: float, options: Sequence[QuantizationOption]) -> dict[str, object]:
    return {
        "schema_version": 1,
        "model": name,
        "scale": scale,
        "types": [
            {
                "name": option.name,
                "bits_per_weight": option.bits_per_weight,
                "needs_importance_matrix": option.needs_importance_matrix,
                "size_bytes": option.size_bytes,
                "tensor_types": dict(option.tensor_types),
            }
            for option in options
        ],
    }
