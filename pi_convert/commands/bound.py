"""``pi-convert bound``."""

from __future__ import annotations

import click

from pi_convert.commands.options import (
    json_option,
    model_argument,
    original_context_option,
    revision_option,
    scale_option,
)


@click.command()
@model_argument
@scale_option(
    required=False,
    help="How many times the context is extended. Left out: the model's own factor.",
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
    """Bound attention scores, interpolated and extrapolated, by the paper's theorem.

    Theorem 2.1 and equation 8 of arXiv 2306.15595 for this model's head size, theta, L and L', with
    the constant of the theorem mended. No weight is read; values are in units of max |h_j|, the
    largest product of a query's and a key's rotated pair.
    """
    from converters.rope.bounds import score_bounds
    from converters.sources import open_checkpoint
    from pi_convert.defaults import resolve_model
    from pi_convert.report.bound import bound_json, bound_text
    from pi_convert.report.console import emit, emit_json

    resolved = resolve_model(model)
    checkpoint = open_checkpoint(
        resolved.reference, revision=revision, original_context=original_context
    )
    bounds = score_bounds(checkpoint.rope.interpolate(1.0 if scale is None else scale))
    if as_json:
        emit_json(bound_json(checkpoint.card.name, bounds))
    else:
        emit(f"{resolved.announcement}\n{bound_text(checkpoint.card.name, bounds)}")
