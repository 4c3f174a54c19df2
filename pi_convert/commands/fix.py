"""``pi-convert fix``."""

from __future__ import annotations

from pathlib import Path

import click

from pi_convert.commands.options import (
    PATH,
    force_option,
    json_option,
    original_context_option,
    require_gguf_file,
    scale_option,
)


@click.command()
@click.argument("file", metavar="FILE.gguf", type=PATH)
@scale_option(
    required=True,
    help="The factor the file should have in all: a repair sets it, nothing is multiplied."
    " 1 removes scaling.",
)
@original_context_option
@click.option("--out", type=PATH, required=True, metavar="NEW", help="The file to write.")
@force_option
@json_option
def command(
    file: Path, scale: float, original_context: int | None, out: Path, force: bool, as_json: bool
) -> None:
    """Repair a GGUF file's RoPE metadata; tensor bytes stay untouched.

    Works for any architecture. Writes NEW with linear scaling by S: type, factor, L and
    context_length, so that llama.cpp needs no flags. L is --original-context, else the file's
    rope.scaling.original_context_length, else its context_length. All other keys and every tensor
    are copied byte for byte, and the tensors' hashes compared.

    \b
    Example:
      pi-convert fix model.gguf --scale 4 --original-context 4096 --out repaired.gguf
    """
    from converters.containers.gguf import read_gguf_file
    from converters.targets.gguf.rewrite import rewrite_gguf
    from pi_convert.audit.repair import plan_repair
    from pi_convert.report.audit import repair_json, repair_text
    from pi_convert.report.console import emit, emit_json, progress

    require_gguf_file(file, "fix")
    source = read_gguf_file(file)
    repair = plan_repair(source, scale, original_context)
    with progress() as tell:
        written = rewrite_gguf(source, out, repair.changes, force=force, progress=tell)
    if as_json:
        emit_json(repair_json(repair, written))
    else:
        emit(repair_text(repair, written))
