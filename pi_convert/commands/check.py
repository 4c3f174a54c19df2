"""``pi-convert check``."""

from __future__ import annotations

from pathlib import Path

import click

from pi_convert.commands.options import PATH, json_option, require_gguf_file

EXIT_WRONG = 3


@click.command()
@click.argument("file", metavar="FILE", type=PATH)
@json_option
@click.pass_context
def command(context: click.Context, file: Path, as_json: bool) -> None:
    """Audit a GGUF file of any architecture, or an ONNX file or folder of any tool.

    Says of RoPE, contexts, tokenizer and tensors what is right, what to note and what is wrong,
    with what to do about it. Exit 3 where anything is wrong. Of a GGUF the header alone is read; of
    ONNX the tables too, and data files are held against the hash that the graph records. Whether
    the weights are the source's only `pi-convert verify` can show.
    """
    from pi_convert.audit.onnx_export import is_onnx
    from pi_convert.audit.onnx_rules import audit_onnx
    from pi_convert.audit.rules import audit_path
    from pi_convert.report.audit import audit_json, audit_text
    from pi_convert.report.console import emit, emit_json

    if file.exists() and is_onnx(file):
        audit = audit_onnx(file)
    else:
        require_gguf_file(file, "check")
        audit = audit_path(file)
    if as_json:
        emit_json(audit_json(audit))
    else:
        emit(audit_text(audit))
    if not audit.is_right:
        context.exit(EXIT_WRONG)
