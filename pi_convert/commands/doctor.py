"""``pi-convert doctor``."""

from __future__ import annotations

import click

from pi_convert.commands.options import json_option

EXIT_BROKEN = 1


@click.command()
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Show versions, libraries and devices, and what is missing.

    Each lack comes with the line that mends it. Exit 1 where the base install is broken.
    """
    from pi_convert.audit.environment import survey_environment
    from pi_convert.report.console import emit, emit_json
    from pi_convert.report.environment import environment_json, environment_text

    environment = survey_environment()
    if as_json:
        emit_json(environment_json(environment))
    else:
        emit(environment_text(environment))
    if not environment.base_works:
        context.exit(EXIT_BROKEN)
