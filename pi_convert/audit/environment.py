"""What this installation has and lacks: the value behind ``doctor``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from converters.errors import ConvertError, EnvironmentNotReadyError
from converters.ggml import Ggml, load_ggml
from converters.ggml.alignment import align_arrays
from converters.install import DEFAULT_MODEL_LINE
from pi_convert.audit.quantizers import QuantizerUse, survey_quantizers
from pi_convert.defaults import default_model_path

T = TypeVar("T")

PACKAGE = "pi-convert"
BASE = "base"
_RUNTIMES_IN_ONE_FOLDER = ("onnxruntime", "onnxruntime-gpu")
_DRIVER_SECONDS = 10
_CPU_FEATURES = (
    "ssse3 avx avx2 f16c fma bmi2 avx_vnni avx512f avx512vl avx512_vnni avx512_bf16 amx_int8"
    " asimd asimddp i8mm sve"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A requirement and what is installed for it; ``version`` is None where nothing is."""

    name: str
    extras: tuple[str, ...]  # (BASE,), or the extras that ask for it
    required: str
    version: str | None
    fits: bool


@dataclass(frozen=True, slots=True)
class GgmlBuild:
    """The libggml that quantizes and runs."""

    package_version: str
    version: str
    commit: str
    folder: Path
    compiled_features: str  # llama.cpp's own words
    offloads_to_gpu: bool
    arrays_aligned: bool  # on cache lines, see converters.ggml.alignment; else it runs slower


@dataclass(frozen=True, slots=True)
class Disk:
    """Free room where something is written."""

    purpose: str
    folder: Path
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not work and the line that mends it. ``breaks_base``: nothing works without."""

    message: str
    remedy: str
    breaks_base: bool = False


@dataclass(frozen=True, slots=True)
class Environment:
    """All that ``doctor`` shows."""

    version: str
    python: str
    system: str
    cores: int
    processor_features: tuple[str, ...]
    packages: tuple[Package, ...]
    ggml: GgmlBuild | None
    quantizers: tuple[QuantizerUse, ...]
    gpus: tuple[str, ...]
    onnx_providers: Mapping[str, str | None]  # None: it can be loaded; else why not
    disks: tuple[Disk, ...]
    default_model: Path | None
    problems: tuple[Problem, ...]

    @property
    def base_works(self) -> bool:
        """Whether the commands of the base install can run."""
        return not any(problem.breaks_base for problem in self.problems)


def survey_environment() -> Environment:
    """Looks at everything; torch is imported only where it is installed, to ask for devices."""
    packages, problems = _packages()
    ggml, problem = _attempt(_ggml_build)
    problems += problem
    quantizers, problem = _attempt(survey_quantizers) if ggml else (None, [])
    problems += [Problem(p.message, p.remedy) for p in problem]
    model, problem = _attempt(_default_model)
    problems += [Problem(p.message, p.remedy) for p in problem]
    problems += _runtime_clash()
    gpus = _gpus()
    problems += _unused_gpus(gpus)
    return Environment(
        version=_version(PACKAGE) or "not installed",
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cores=_cores(),
        processor_features=_processor_features(),
        packages=tuple(packages),
        ggml=ggml,
        quantizers=quantizers or (),
        gpus=gpus,
        onnx_providers=_onnx_providers(),
        disks=tuple(_disks()),
        default_model=model,
        problems=tuple(problems),
    )


def _attempt(survey: Callable[[], T]) -> tuple[T | None, list[Problem]]:
    """What ``survey`` gives, or the error it raised as a problem of the base install."""
    try:
        return survey(), []
    except ConvertError as error:
        return None, [Problem(error.message, error.hint, breaks_base=True)]


def _packages() -> tuple[list[Package], list[Problem]]:
    """Every requirement of the package's own metadata, by extra."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return [], [Problem(f"{PACKAGE} is not installed", f"pip install {PACKAGE}", True)]
    packages: dict[str, Package] = {}
    for package in filter(None, map(_requirement, lines)):
        known = packages.get(package.name)
        extras = package.extras + (known.extras if known else ())
        packages[package.name] = replace(package, extras=tuple(sorted(set(extras))))
    ordered = sorted(packages.values(), key=lambda p: (BASE not in p.extras, p.name))
    problems = [
        Problem(
            f"{package.name} {package.version or 'is missing'}"
            + ("" if package.version is None else f" is installed, {package.required} is needed"),
            f"pip install '{package.name}{package.required}'",
            breaks_base=True,
        )
        for package in ordered
        if BASE in package.extras and not package.fits
    ]
    return ordered, problems


def _requirement(line: str) -> Package | None:
    """The package that a requirement names; None where it is for another platform."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    marker = requirement.marker
    extras: tuple[str, ...] = (BASE,)
    if marker is not None and not marker.evaluate({"extra": ""}):
        extras = tuple(extra for extra in _extras() if marker.evaluate({"extra": extra}))
    if not extras or requirement.name == PACKAGE:
        return None
    version = _version(requirement.name)
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    return Package(requirement.name, extras, str(requirement.specifier), version, fits)


def _extras() -> list[str]:
    return importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ggml_build() -> GgmlBuild:
    ggml: Ggml = load_ggml()
    libraries = ggml.libraries
    return GgmlBuild(
        package_version=libraries.package_version,
        version=libraries.ggml_version,
        commit=libraries.ggml_commit,
        folder=libraries.folder,
        compiled_features=ggml.system_info().strip(),
        offloads_to_gpu=ggml.supports_gpu_offload(),
        arrays_aligned=align_arrays(),
    )


def _default_model() -> Path:
    path = default_model_path()
    if not path.is_file():
        raise EnvironmentNotReadyError(
            f"{path} is missing", hint=f"{DEFAULT_MODEL_LINE} --force-reinstall"
        )
    return path


def _runtime_clash() -> list[Problem]:
    """Two distributions share one import folder; which one runs is the last one installed."""
    found = [name for name in _RUNTIMES_IN_ONE_FOLDER if _version(name) is not None]
    if len(found) < 2:
        return []
    return [
        Problem(
            f"{' and '.join(found)} are both installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(found)} && pip install --force-reinstall {found[-1]}",
        )
    ]


def _cores() -> int:
    """Cores this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def _processor_features() -> tuple[str, ...]:
    """The processor's features that ggml has code for; () where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(values.split())
            return tuple(feature for feature in _CPU_FEATURES.split() if feature in present)
    return ()


def _gpus() -> tuple[str, ...]:
    """CUDA devices by torch's own count; none where torch is not installed."""
    if find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices)


def _onnx_providers() -> dict[str, str | None]:
    """ONNX Runtime's providers, and why one cannot be loaded: a build lists CUDA wherever it is."""
    if find_spec("onnxruntime") is None:
        return {}
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    return {name: _load_problem(folder, name) for name in onnxruntime.get_available_providers()}


def _load_problem(folder: Path, provider: str) -> str | None:
    """What a provider that is a library of its own is linked with and does not find."""
    kind = provider.removesuffix("ExecutionProvider").lower()
    library = folder / f"libonnxruntime_providers_{kind}.so"
    if not library.is_file():
        return None
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"))
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def _unused_gpus(gpus: tuple[str, ...]) -> list[Problem]:
    """A device that the driver lists and the installed torch cannot use."""
    program = shutil.which("nvidia-smi")
    if gpus or program is None or find_spec("torch") is None:
        return []
    try:
        listed = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, check=False,
            timeout=_DRIVER_SECONDS,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if not listed:
        return []
    return [
        Problem(
            f"torch {_version('torch')} cannot use {listed.splitlines()[0]}",
            "Install torch's CUDA build: pip install --force-reinstall torch",
        )
    ]


def _disks() -> Iterator[Disk]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for purpose, folder in (("current folder", Path.cwd()), ("hub cache", Path(HF_HUB_CACHE))):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        yield Disk(purpose, folder, shutil.disk_usage(existing).free)
