"""What `--scale` may mean for a checkpoint that has, or lost, a factor of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint


def require_known_factor(stated: float | None, source: Checkpoint) -> None:
    """Raises ``UsageError`` for an adapter that records no factor and was given none."""
    from converters.sources.lora import KIND
    from pi_convert.audit.stripped import unrecorded_scaling

    if stated is None and source.origin.kind == KIND and source.rope.factor == 1.0:
        raise click.UsageError(f"Missing option '--scale': {unrecorded_scaling(source)}.")


def chosen_scale(stated: float | None, source: Checkpoint) -> float:
    """The scale of a command that interpolates; a model that is interpolated already needs none.

    Raises ``UsageError`` where it is missing, and what ``require_no_second_factor`` does.
    """
    from pi_convert.audit.stripped import unrecorded_scaling

    if stated is None and source.rope.factor == 1.0:
        what = unrecorded_scaling(source) or "MODEL has none"
        raise click.UsageError(f"Missing option '--scale': {what}.")
    require_no_second_factor(stated, source)
    return 1.0 if stated is None else stated


def require_no_second_factor(stated: float | None, source: Checkpoint) -> None:
    """Raises ``RopeError`` for a scale on top of the one that an adapter records."""
    from converters.errors import RopeError
    from converters.sources.lora import KIND

    factor = source.rope.factor
    if source.origin.kind == KIND and stated not in (None, 1.0) and factor != 1.0:
        raise RopeError(
            f"--scale {stated:g} on an adapter that records factor {factor:g} would make"
            f" {factor * stated:g}",
            hint="Leave out --scale, or give --scale 1; to extend it further, export a"
            " safetensors folder first.",
        )


def note_second_factor(stated: float | None, source: Checkpoint) -> None:
    """Says on stderr that a scale comes on top of the factor that the source has."""
    factor = source.rope.factor
    if stated in (None, 1.0) or factor == 1.0:
        return
    click.echo(
        f"note: {source.origin.label} has factor {factor:g} already, and --scale {stated:g} makes"
        f" {factor * stated:g}; leave it out for {factor:g}",
        err=True,
    )
