"""Other exporters in environments of their own, made when missing under .cache/bench-envs."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent.parent / ".cache" / "bench-envs"
TORCH_SCRIPT = str(Path(__file__).parent / "peer_torch_onnx.py")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with pinned packages."""

    name: str
    packages: tuple[str, ...]

    def python(self) -> str:
        """Its interpreter; the environment is made on the first call."""
        folder = ENVIRONMENTS / self.name
        python = folder / "bin" / "python"
        wanted = hashlib.sha256(" ".join(self.packages).encode()).hexdigest()
        made = folder / ".made"
        if not made.is_file() or made.read_text() != wanted:
            print(f"installing {', '.join(self.packages)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *self.packages], check=True)
            made.write_text(wanted)
        return str(python)

    def versions(self) -> dict[str, str]:
        """Package to installed version, of those that were asked for."""
        names = [package.split("=")[0].split("<")[0] for package in self.packages]
        program = (
            "import sys, importlib.metadata as m; print(*(m.version(n) for n in sys.argv[1:]))"
        )
        found = subprocess.run(
            [self.python(), "-c", program, *names], capture_output=True, text=True, check=True
        )
        return dict(zip(names, found.stdout.split(), strict=True))


GENAI = Environment(
    "genai",
    ("onnxruntime-genai==0.18.0", "torch==2.13.0", "transformers==5.24.0",
     "onnx==1.23.2", "onnx-ir==1.1.0", "onnxscript"),
)  # fmt: skip
OPTIMUM = Environment(
    "optimum", ("optimum-onnx==0.1.0", "transformers<4.58", "torch==2.13.0", "onnxruntime")
)
MOBIUS = Environment("mobius", ("mobius-onnx==0.1.0", "torch==2.13.0", "transformers==5.24.0"))


def genai(model: Path, out: Path, precision: str) -> list[list[str]]:
    """onnxruntime-genai's builder; int4 in blocks of 32, symmetric, accuracy level 4, as ours."""
    options = ["int4_block_size=32", "int4_accuracy_level=4", "int4_is_symmetric=true"]
    extra = ["--extra_options", *options] if precision == "int4" else []
    return [[GENAI.python(), "-m", "onnxruntime_genai.models.builder", "-i", str(model),
             "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(out / "cache"),
             *extra]]  # fmt: skip


def optimum(model: Path, out: Path) -> list[list[str]]:
    """optimum-onnx's command."""
    cli = str(Path(OPTIMUM.python()).parent / "optimum-cli")
    return [[cli, "export", "onnx", "--model", str(model), "--task", "text-generation-with-past",
             str(out)]]  # fmt: skip


def torch_dynamo(model: Path, out: Path) -> list[list[str]]:
    """torch.onnx.export(dynamo=True) of transformers' model with its cache."""
    return [[GENAI.python(), TORCH_SCRIPT, str(model), str(out)]]


def mobius(model: Path, out: Path) -> list[list[str]]:
    """mobius-onnx's command."""
    cli = str(Path(MOBIUS.python()).parent / "mobius")
    return [[cli, "build", "--config", str(model), str(out), "--dtype", "f32"]]
