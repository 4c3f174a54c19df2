"""An environment as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping

from converters.install import DEFAULT_MODEL_EXTRA, DEFAULT_MODEL_LINE, install_line
from pi_convert.audit.environment import BASE, Environment, GgmlBuild
from pi_convert.report.console import pairs, size, table

SCHEMA_VERSION = 1


def environment_text(environment: Environment) -> str:
    """What is there, what is missing, and the lines that install it."""
    about = {
        "pi-convert": environment.version,
        "python": environment.python,
        "system": environment.system,
        "processor": f"{environment.cores} cores usable; "
        + (" ".join(environment.processor_features) or "features not told"),
        "GPU": "; ".join(environment.gpus) or "none that torch can use",
        "ONNX Runtime": _providers(environment.onnx_providers) or "not installed",
    }
    parts = [
        pairs(about),
        "libggml\n" + (_ggml_text(environment.ggml) if environment.ggml else "  not usable"),
        "K-quants\n" + _quantizer_table(environment),
        "Packages\n" + _package_table(environment),
        "Room\n" + _room(environment),
        _default_model(environment),
        *(f"{extra}: {line}" for extra, line in _installs(environment).items()),
    ]
    for problem in environment.problems:
        label = "PROBLEM" if problem.breaks_base else "problem"
        parts.append(f"{label}: {problem.message}\n  {problem.remedy}")
    works = "works" if environment.base_works else "is broken: see PROBLEM above"
    return "\n\n".join([*parts, f"The base install {works}."])


def _providers(found: Mapping[str, str | None]) -> str:
    """CPU; CUDA: libcublasLt.so.13: cannot open shared object file."""
    names = {name.removesuffix("ExecutionProvider"): problem for name, problem in found.items()}
    works = [name for name, problem in names.items() if problem is None]
    return "; ".join([", ".join(works), *(f"not {n}: {p}" for n, p in names.items() if p)])


def _ggml_text(build: GgmlBuild) -> str:
    return pairs(
        {
            "llama-cpp-python": build.package_version,
            "ggml": f"{build.version}, commit {build.commit or 'not told'}",
            "in": str(build.folder),
            "compiled for": build.compiled_features or "not told",
            "GPU offload": "yes" if build.offloads_to_gpu else "no: CPU build",
            "large arrays": "on cache lines"
            if build.arrays_aligned
            else "anywhere: slower; the library that aligns them was not compiled",
        }
    )


def _quantizer_table(environment: Environment) -> str:
    rows = [
        [
            use.type_name,
            use.maker,
            "-" if use.kernel_rate is None else f"{use.kernel_rate / 1e6:,.0f}",
            f"{use.ggml_rate / 1e6:,.1f}",
            use.reason,
        ]
        for use in environment.quantizers
    ]
    header = ("type", "made by", "kernels, M elements/s a core", "ggml's", "because")
    return table(rows, header=header) if rows else "  not usable"


def _package_table(environment: Environment) -> str:
    rows = [
        [
            package.name,
            ", ".join(package.extras),
            package.version or "missing",
            package.required + ("" if package.fits or package.version is None else "  NOT MET"),
        ]
        for package in environment.packages
    ]
    return table(rows, header=("package", "for", "installed", "required"))


def _room(environment: Environment) -> str:
    return table(
        [[disk.purpose, f"{size(disk.free_bytes)} free", str(disk.folder)]
         for disk in environment.disks]
    )  # fmt: skip


def _default_model(environment: Environment) -> str:
    path = environment.default_model
    return f"Default model: {path or 'not installed'}"


def _installs(environment: Environment) -> dict[str, str]:
    """For each extra that lacks something, the line that installs it."""
    lacking = {
        extra
        for package in environment.packages
        if BASE not in package.extras and not package.fits
        for extra in package.extras
    }
    return {f"missing for {extra}": _install(extra) for extra in sorted(lacking)}


def _install(extra: str) -> str:
    return DEFAULT_MODEL_LINE if extra == DEFAULT_MODEL_EXTRA else install_line(extra)


def environment_json(environment: Environment) -> dict[str, object]:
    """The same for machines; ``schema_version`` changes when a field does."""
    build = environment.ggml
    return {
        "schema_version": SCHEMA_VERSION,
        "base_works": environment.base_works,
        "version": environment.version,
        "python": environment.python,
        "system": environment.system,
        "cores": environment.cores,
        "processor_features": list(environment.processor_features),
        "packages": [
            {
                "name": package.name,
                "extras": list(package.extras),
                "required": package.required,
                "version": package.version,
                "fits": package.fits,
            }
            for package in environment.packages
        ],
        "ggml": None
        if build is None
        else {
            "package_version": build.package_version,
            "version": build.version,
            "commit": build.commit,
            "folder": str(build.folder),
            "compiled_features": build.compiled_features,
            "offloads_to_gpu": build.offloads_to_gpu,
            "arrays_aligned": build.arrays_aligned,
        },
        "quantizers": [
            {
                "type": use.type_name,
                "made_by": use.maker,
                "reason": use.reason,
                "kernel_elements_per_second": use.kernel_rate,
                "ggml_elements_per_second": use.ggml_rate,
            }
            for use in environment.quantizers
        ],
        "gpus": list(environment.gpus),
        "onnx_providers": dict(environment.onnx_providers),
        "disks": [
            {"purpose": disk.purpose, "folder": str(disk.folder), "free_bytes": disk.free_bytes}
            for disk in environment.disks
        ],
        "default_model": None
        if environment.default_model is None
        else str(environment.default_model),
        "problems": [
            {"message": p.message, "remedy": p.remedy, "breaks_base": p.breaks_base}
            for p in environment.problems
        ],
    }
