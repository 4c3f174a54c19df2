"""``pi-convert inspect``."""

from __future__ import annotations

import click

from pi_convert.commands.options import json_option, original_context_option, revision_option


@click.command()
@click.argument("path", metavar="PATH")
@original_context_option
@revision_option
@json_option
def command(path: str, original_context: int | None, revision: str | None, as_json: bool) -> None:
    """Describe any source or artifact: architecture, RoPE, contexts, tensors, sizes.

    PATH is a Hugging Face folder, a GGUF file (of any architecture), an ONNX file or folder (of
    any tool) or a hub id. RoPE is shown as the factor that acts, L and L' with what told them; no
    weight is read.
    """
    from pathlib import Path

    from pi_convert.audit.description import describe
    from pi_convert.audit.onnx_export import is_onnx
    from pi_convert.report.console import emit, emit_json
    from pi_convert.report.description import description_json, description_text

    if is_onnx(Path(path)) and revision is None:
        from pi_convert.audit.onnx_description import describe_onnx

        description = describe_onnx(Path(path))
    else:
        description = describe(path, revision=revision, original_context=original_context)
    if as_json:
        emit_json(description_json(description))
    else:
        emit(description_text(description))
