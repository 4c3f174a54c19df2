"""One run from a checkpoint to a folder: everything but the command line.

The folder holds ``run/`` (recipe, tokens, checkpoints, log) from the start, and the model once the
training is over; its config.json comes last, so that it is a checkpoint only when it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.checkpoint import Checkpoint
from converters.containers.strict_json import read_json_object
from converters.content_hash import content_hash, tensor_hash
from converters.encodings import F32
from converters.errors import EnvironmentNotReadyError, OutputError, SourceError
from converters.files import atomic_file
from converters.install import install_line
from converters.progress import Progress as Tell
from converters.progress import silent
from converters.sources.huggingface import FINETUNE_RECORD, HEAD, RECIPE, RUN
from converters.targets.huggingface import files_beside_tensors, write_folder
from converters.tensor import Tensor
from pi_convert.finetune.data import Encoder, TokenStore, open_store, tokenise, windows
from pi_convert.finetune.documents import documents, fingerprint, text_files
from pi_convert.finetune.memory import return_freed_memory
from pi_convert.finetune.processes import all_ready, leave_together
from pi_convert.finetune.recipe import Recipe, run_record

if TYPE_CHECKING:
    from pi_convert.finetune.progress import Report, Schedule, Told
    from pi_convert.finetune.train import Outcome, Passes

_NO_LIMIT = 10**9  # tokens a tokenizer is told it may give
_FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("preset", "scale", "window", "steps", "learning_rate", "seed")
} | {"global_batch": "--batch", "allow_short_window": "--allow-short-window"}
_FOLLOWING = "window", "learning_rate"  # by default from MODEL and --scale
_INPUTS = {"source": "MODEL has other weights", "data": "the text is another"}


@dataclass(frozen=True, slots=True)
class FinetuneRequest:
    """What to train; ``source`` is not interpolated yet."""

    source: Checkpoint
    recipe: Recipe
    texts: tuple[Path, ...]
    out: Path
    schedule: Schedule
    passes: Passes
    device: str = "cpu"
    resume: bool = False

    @property
    def target(self) -> Checkpoint:
        """The checkpoint that is trained."""
        return self.source.interpolate(self.recipe.scale)


@dataclass(frozen=True, slots=True)
class Finetuned:
    """How a run ended; ``record`` is what is kept beside the weights."""

    outcome: Outcome
    out: Path
    record: dict[str, object]


def finetune(
    request: FinetuneRequest,
    report: Report,
    tell: Tell = silent,
    told: Told | None = None,
) -> Finetuned:
    """Trains, and writes the folder; or stops at a Ctrl-C with a checkpoint to resume from.

    Raises ``ConvertError`` or one of its kinds for what cannot be trained; a run that was there
    before is left as it was, and one that cannot start leaves nothing. Of several processes one
    raises that; the others raise ``OtherProcessError``.
    """
    require_libraries(request.device)
    from pi_convert.finetune import checkpoints, train
    from pi_convert.finetune.model import load_model, require_frequencies
    from pi_convert.finetune.progress import LOG_NAME, Progress, Told

    _quiet(request.source)
    run = request.out / RUN
    arguments = train.training_arguments(
        run / checkpoints.CHECKPOINTS,
        request.recipe,
        request.device,
        request.schedule,
        request.passes,
    )
    is_main = arguments.process_index == 0

    def prepare() -> dict[str, object]:
        train.share_batch(arguments, request.recipe, request.passes)
        return _prepare(request, tell, is_main=is_main)

    record = all_ready(arguments, prepare)
    store = open_store(run / "tokens")
    corpus = train.Corpus(store, *train.split_windows(windows(store, request.recipe.window)))
    record["text"] = {
        "tokens": store.tokens,
        "windows": len(corpus.trained),
        "held_out_windows": len(corpus.held_out),
    }
    rope = request.target.rope
    model = load_model(run / "base", rope, request.recipe)
    if request.device == "cpu":
        return_freed_memory(model.model.layers)
    progress = Progress(
        request.recipe,
        rope.original_context,
        request.schedule,
        run / LOG_NAME,
        report,
        told or Told(),
    )
    trainer = train.make_trainer(model, corpus, request.recipe, arguments, progress)
    kept = None
    if request.resume:
        kept = checkpoints.last_checkpoint(run / checkpoints.CHECKPOINTS)
        if is_main:
            progress.told.resumed(checkpoints.step_of(kept) if kept else 0)
    outcome = train.train(trainer, progress, kept)
    require_frequencies(model, rope, "after training")
    if outcome.finished:
        _write(request, trainer, model, record, is_main=is_main)
    leave_together(arguments)
    return Finetuned(outcome, request.out, record)


def _quiet(source: Checkpoint) -> None:
    """No bars of transformers between our lines, and no warning of what is as it should be."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("trainer", "trainer_utils"):
        logger = logging.getLogger(f"transformers.{name}")
        for known in [f for f in logger.filters if isinstance(f, _Harmless)]:
            logger.removeFilter(known)
        logger.addFilter(_Harmless(tied=source.hparams.tied_embeddings))


class _Harmless(logging.Filter):
    """Keeps back two of transformers' warnings.

    That a checkpoint does not hold the head, which is tied, and that the numbers of checkpoints
    tell their order and not their times.
    """

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self._starts = ["mtime may not be reliable"]
        if tied:
            self._starts.append(
                f"There were missing keys in the checkpoint model loaded: ['{HEAD}']"
            )

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is let through."""
        return not record.getMessage().startswith(tuple(self._starts))


def require_libraries(device: str = "cpu") -> None:
    """Raises ``EnvironmentNotReadyError`` without the extra, or without the device."""
    try:
        import accelerate  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise EnvironmentNotReadyError(
            f"fine-tuning needs {error.name}", hint=f"Install: {install_line('finetune')}"
        ) from error
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise EnvironmentNotReadyError(
            f"fine-tuning needs torch 2.13 or newer, found {torch.__version__}",
            hint=f"Install: {install_line('finetune')}",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentNotReadyError(
            "torch sees no CUDA device",
            hint="Leave --device at cpu, or install a build of torch for your GPU.",
        )


def _about_source(source: Checkpoint, tell: Tell) -> dict[str, object]:
    """Which weights are trained, wherever they lie: a run is not gone on with from others."""
    hashes = {}
    for done, (name, tensor) in enumerate(source.tensors.items(), start=1):
        hashes[name] = tensor_hash(tensor)
        tell("hashing the source", done, len(source.tensors))
    return {"sha256": content_hash(source.tensors, hashes)}


def _about(files: Sequence[Path]) -> dict[str, object]:
    return {"files": [file.name for file in files], "sha256": fingerprint(files)}


def _prepare(request: FinetuneRequest, tell: Tell, *, is_main: bool) -> dict[str, object]:
    """The run's record; the main process makes the run folder of it too."""
    if is_main:
        require_own(request.out, request.recipe, resume=request.resume)
    files = text_files(request.texts, request.out)
    source = _about_source(request.source, tell) if is_main else {}
    record = run_record(request.recipe, request.target.rope, source, _about(files))
    if is_main:
        _make_run(request, files, record, tell)
    return record


def _make_run(
    request: FinetuneRequest, files: Sequence[Path], record: dict[str, object], tell: Tell
) -> None:
    """The run folder with its recipe, the interpolated base and the tokens.

    A new run that cannot be prepared leaves the folder as it was found.
    """
    run = request.out / RUN
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    if not missing:
        _require_same_settings(request.out, record)
    try:
        if missing:
            run.mkdir(parents=True)
            with atomic_file(run / RECIPE, force=False) as partial:
                partial.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        windows(_tokens(request, files, run, tell), request.recipe.window)
        if not (run / "base" / "config.json").is_file():
            write_folder(request.target, run / "base", progress=tell)
    except KeyboardInterrupt:  # goes on with --resume
        raise
    except BaseException:  # a panic of the tokenizer's Rust is no Exception
        if missing:
            shutil.rmtree(missing[-1], ignore_errors=True)
        raise


def require_own(out: Path, recipe: Recipe, *, resume: bool) -> None:
    """Raises ``OutputError`` unless the folder is new or empty, or holds a run to go on with."""
    if (out / RUN / RECIPE).is_file():
        if (out / "config.json").is_file():
            found = _stated(out / RUN / RECIPE)
            other = _other_settings(found, {"recipe": dataclasses.asdict(recipe)})
            more = f" with other settings: {other}" if other else ""
            raise OutputError(
                f"{out} holds a finished run{more}",
                hint=f"`pi-convert export {shlex.quote(str(out))} --to gguf` takes it. It"
                " cannot be trained further here: give another --out.",
            )
        if not resume:
            raise OutputError(
                f"{out} holds a run that is not finished",
                hint="Go on with it by --resume, or give another --out.",
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is no run of finetune", hint="Give another --out.")
    if resume:
        raise OutputError(
            f"{out} holds no run to resume",
            hint="Give the --out of the run, or leave out --resume to start one.",
        )


def _require_same_settings(out: Path, record: dict[str, object]) -> None:
    found = _stated(out / RUN / RECIPE)
    if found != _plain(record):
        raise OutputError(
            f"{out} holds a run with other settings: {_other_settings(found, record)}",
            hint="Resume with the settings it was started with, or give another --out.",
        )


def _stated(recipe: Path) -> dict[str, Any]:
    try:
        return read_json_object(recipe)
    except SourceError as error:
        raise OutputError(error.message, hint="Start anew with another --out.") from error


def _plain(record: dict[str, object]) -> Any:
    return json.loads(json.dumps(record))


def _other_settings(found: dict[str, Any], record: dict[str, object]) -> str:
    """What the run in a folder (``found``) and ``record`` do not share, in a person's words."""
    here, there = _plain(record), found.get("recipe", {})
    said = [
        what for name, what in _INPUTS.items() if name in here and found.get(name) != here[name]
    ]
    others = [name for name, value in here["recipe"].items() if there.get(name) != value]
    if "scale" in others or _INPUTS["source"] in said:  # what follows from them says nothing more
        others = [name for name in others if name not in _FOLLOWING]
    said += [
        f"{_FLAGS.get(name, name)} is {here['recipe'][name]}, the run has {there.get(name)}"
        for name in others
    ]
    rest = (name for name in here if name != "recipe" and found.get(name) != here[name])
    return "; ".join(said or rest)


def _tokens(request: FinetuneRequest, files: Sequence[Path], run: Path, tell: Tell) -> TokenStore:
    from transformers import AutoTokenizer

    eos = request.source.vocabulary.special_ids.get("eos")
    if eos is None:
        raise SourceError(
            "the tokenizer names no EOS token, which separates documents",
            hint="State eos_token in tokenizer_config.json.",
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files_beside_tensors(request.target).items():
            (Path(folder) / name).write_bytes(data)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = _NO_LIMIT

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids[:-1] if ids and ids[-1] == eos else ids

    encoder = Encoder(encode, eos, request.source.hparams.vocab_size)
    return tokenise(documents(files), encoder, run / "tokens", tell)


def _write(
    request: FinetuneRequest, trainer: Any, model: Any, record: dict[str, object], *, is_main: bool
) -> None:
    """The model's folder, from the weights of every process; then what only a resume needs goes."""
    from pi_convert.finetune.checkpoints import CHECKPOINTS
    from pi_convert.finetune.model import merged_weights, require_saved_frequencies

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_main:
        return
    run, target = request.out / RUN, request.target
    weights = merged_weights(state, request.recipe)
    trained = dataclasses.replace(
        target,
        tensors={name: _tensor(name, weights[name]) for name in target.tensors},
        side_files={
            **target.side_files,
            FINETUNE_RECORD: json.dumps(record, indent=2).encode() + b"\n",
        },
    )
    write_folder(trained, run / "model", _dtype(request.source), force=True)
    require_saved_frequencies(run / "model", model, target.rope)
    made = sorted((run / "model").iterdir(), key=lambda path: path.name == "config.json")
    for path in made:  # config.json last
        path.replace(request.out / path.name)
    for name in ("model", "base", CHECKPOINTS):
        shutil.rmtree(run / name, ignore_errors=True)


def _dtype(source: Checkpoint) -> str:
    """The type that the source's weights have, or float32 where it has several or is quantized."""
    names = {tensor.encoding.name for tensor in source.tensors.values()}
    return next(iter(names)) if names in ({"f16"}, {"bf16"}) else "f32"


def _tensor(name: str, value: Any) -> Tensor:
    array = np.ascontiguousarray(value.detach().float().cpu().numpy())
    rows = array.reshape(-1, array.shape[-1]).view(np.uint8)
    return Tensor(name, array.shape, F32, lambda start, stop: rows[start:stop])
