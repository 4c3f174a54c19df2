"""``pi-convert check``."""

from __future__ import annotations

from pathlib import Path

import click

from pi_convert.commands.options import PATH, json_option, require_gguf_file

EXIT_WRONG = 3


@click.command()
@click.argument("file", metavar="FILE.gguf", type=PATH)
@json_option
@click.pass_context
def command(context: click.Context, file: Path, as_json: bool) -> None:
    """Audit a GGUF file's metadata, of any architecture.

    Reads the header only, and says of RoPE, contexts, tokenizer and tensors what is right, what to
    note and what is wrong, with what to do about it. Exit 3 where anything is wrong. Whether the
    weights are right a header cannot show: `pi-convert verify` can.
    """
    from pi_convert.audit.rules import audit_path
    from pi_convert.report.audit import audit_json, audit_text
    from pi_convert.report.console import emit, emit_json

    require_gguf_file(file, "check")
    audit = audit_path(file)
    if as_json:
        emit_json(audit_json(audit))
    else:
        emit(audit_text(audit))
    if not audit.is_right:
        context.exit(EXIT_WRONG)
