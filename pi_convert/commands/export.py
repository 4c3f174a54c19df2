"""``pi-convert export``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pi_convert.commands._exporting import ExportOptions, require_export, run_export
from pi_convert.commands.options import (
    PATH,
    force_option,
    json_option,
    model_argument,
    original_context_option,
    revision_option,
    scale_option,
)

TARGETS = ("gguf", "onnx", "safetensors")
DTYPES = ("f32", "f16", "bf16")
PRECISIONS = ("fp32", "fp16", "int8", "int4", "int8f16", "int4f16")
STORAGES = ("float", "int8", "int4")


@click.command()
@model_argument
@click.option(
    "--to",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    required=True,
    help="Format to write; may be repeated, the source is opened once.",
)
@scale_option(
    required=False,
    help="Factor s that the context is extended by; 1 leaves it as it is. May be left out where"
    " MODEL is scaled itself.",
)
@click.option(
    "--quantize",
    multiple=True,
    metavar="TYPE",
    help="GGUF type such as q4_k_m or f16 (see `pi-convert quants`); may be repeated."
    " Default: q4_k_m; a quantized source keeps its tensors as they are.",
)
@click.option(
    "--quantizer",
    type=click.Choice(("auto", "native", "ggml")),
    help="Who makes K-quants: pi-convert's own kernels, ggml, or (auto, the default) the kernels"
    " where they make the same bytes. Also PI_CONVERT_QUANTIZER.",
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Let --quantize and --precision quantize a quantized source again.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of a safetensors folder. Default: the source's; float32 for a quantized one.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="ONNX file to write; may be repeated. f16: with float16 activations, for a GPU."
    " Default: fp32.",
)
@click.option(
    "--for",
    "device",
    type=click.Choice(("cpu", "cuda", "web")),
    help="Where the ONNX files will run; what has no kernel there is refused. Default: as cpu,"
    " with a notice where onnxruntime is missing.",
)
@click.option(
    "--block-size",
    type=click.Choice(("32", "128")),
    help="Weights to a scale in int8 and int4 ONNX files. Default: 32.",
)
@click.option("--asymmetric", is_flag=True, help="ONNX: blocks with a zero point of their own.")
@click.option(
    "--embedding",
    type=click.Choice(STORAGES),
    help="How int8 and int4 ONNX files store the embedding (float: not quantized). Default: int8.",
)
@click.option(
    "--head", type=click.Choice(STORAGES), help="The same for the output head. Default: int8."
)
@click.option(
    "--accuracy-level",
    type=click.IntRange(0, 4),
    metavar="N",
    help="Of int8 and int4 ONNX products: 4 (default) is fast and rounds activations to 8 bits,"
    " 0 leaves them as they are.",
)
@click.option("--last-logits", is_flag=True, help="ONNX: logits of each row's last token alone.")
@click.option("--portable", is_flag=True, help="ONNX: standard operators only (opset 23).")
@click.option("--out", type=PATH, default=Path(), help="Folder to write to. Default: this one.")
@click.option(
    "--verify",
    type=click.Choice(("quick", "full")),
    help="Prove each GGUF and ONNX file after writing it; exit 3 where the proof fails.",
)
@click.option(
    "--finetune",
    "texts",
    type=PATH,
    multiple=True,
    help="Text to fine-tune on first, with preset quick, into a folder under --out; repeatable."
    " `pi-convert finetune` has every setting.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N", help="Of --finetune. Default: 200."
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: every core.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing.")
@original_context_option
@revision_option
@force_option
@json_option
def command(
    model: str | None,
    scale: float | None,
    original_context: int | None,
    revision: str | None,
    texts: tuple[Path, ...],
    steps: int | None,
    **flags: object,
) -> int:
    """Write a checkpoint as GGUF, ONNX or safetensors, with its RoPE interpolated.

    The RoPE of MODEL is scaled by S (factors compose: a model of factor 2 exported with --scale 4
    has factor 8) and written in every spelling that readers of the format need.

    \b
    Examples:
      pi-convert export --to gguf --scale 8
      pi-convert export ./vicuna --to gguf --scale 4 --quantize q8_0 --verify quick
      pi-convert export --to onnx --scale 8 --precision fp32 --precision int4
      pi-convert export --to gguf --scale 8 --finetune ./books --steps 200
      pi-convert export org/name --revision main --to safetensors --scale 2 --dtype bf16
    """
    options = ExportOptions(**flags)  # type: ignore[arg-type]
    _check_usage(options)
    if steps is not None and not texts:
        raise click.UsageError("--steps goes with --finetune PATH.")
    if texts and options.dry_run:
        raise click.UsageError("--dry-run does not go with --finetune, which trains.")
    from converters.sources import open_checkpoint
    from pi_convert.commands._scale import chosen_scale, note_second_factor
    from pi_convert.defaults import resolve_model
    from pi_convert.report.console import emit

    started = time.monotonic()
    resolved = resolve_model(model)
    if not options.as_json:
        emit(resolved.announcement)
    source = open_checkpoint(
        resolved.reference, revision=revision, original_context=original_context
    )
    chosen = chosen_scale(scale, source)
    note_second_factor(scale, source)
    if texts:
        from pi_convert.commands.finetune import as_tuned, tuned_source

        require_export(as_tuned(source), chosen, options)  # before hours are spent
        if options.threads is not None:
            from pi_convert.runtimes.pytorch import limit_threads

            limit_threads(options.threads)
        tuned = tuned_source(source, chosen, texts, steps, options.out)
        return run_export(tuned, 1.0, options, started)
    return run_export(source, chosen, options, started)


def _check_usage(options: ExportOptions) -> None:
    if options.quantize and "gguf" not in options.targets:
        raise click.UsageError("--quantize is for --to gguf; a safetensors folder takes --dtype.")
    if options.quantizer and "gguf" not in options.targets:
        raise click.UsageError("--quantizer makes K-quants, which are for --to gguf.")
    if options.dtype and "safetensors" not in options.targets:
        raise click.UsageError(
            f"--dtype is for --to safetensors; for a GGUF file give --quantize {options.dtype}."
        )
    _check_types(options.quantize)
    if options.allow_requantize and not (options.quantize or options.precisions):
        raise click.UsageError("--allow-requantize goes with --quantize or --precision.")
    _check_onnx(options)
    if options.verify and not {"gguf", "onnx"} & set(options.targets):
        raise click.UsageError("--verify proves GGUF and ONNX files; add --to gguf or --to onnx.")
    if options.verify and options.last_logits:
        raise click.UsageError(
            "--verify compares the logits of every token, which --last-logits leaves out."
        )
    if options.verify and options.dry_run:
        raise click.UsageError("--dry-run writes nothing that --verify could prove.")


def _check_onnx(options: ExportOptions) -> None:
    of_blocks = {
        "--block-size": options.block_size,
        "--asymmetric": options.asymmetric,
        "--embedding": options.embedding,
        "--head": options.head,
        "--accuracy-level": options.accuracy_level is not None,
    }
    for_onnx = {
        "--precision": options.precisions,
        "--for": options.device,
        **of_blocks,
        "--last-logits": options.last_logits,
        "--portable": options.portable,
    }
    if "onnx" not in options.targets and (given := [n for n, value in for_onnx.items() if value]):
        raise click.UsageError(f"{', '.join(given)}: for --to onnx.")
    quantized = any(name.startswith("int") for name in options.precisions)
    if not quantized and (given := [n for n, value in of_blocks.items() if value]):
        raise click.UsageError(f"{', '.join(given)}: for --precision int8 or int4.")


def _check_types(names: tuple[str, ...]) -> None:
    if not names:
        return
    from converters.targets.gguf.types import FILE_TYPES

    unknown = [name for name in names if name.lower() not in FILE_TYPES]
    if unknown:
        raise click.UsageError(
            f"--quantize {', '.join(map(repr, unknown))}: there is no such type. Known are"
            f" {', '.join(FILE_TYPES)}; `pi-convert quants` lists their sizes."
        )
