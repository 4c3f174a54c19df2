"""The ``pi-convert`` command: a group whose subcommands load only when they run.

Exit codes: 0 done; 1 bad input or failure; 2 wrong use of the command line; 3 not proven.
"""

import sys

EXIT_FAILURE = 1
_ONE_TEXT = "Every --text takes one path: repeat it, or give a folder."
EXIT_INTERRUPTED = 130

try:  # these take most of the time until ``run`` can answer a Ctrl-C
    import contextlib
    import importlib
    import logging
    import os
    import signal
    from typing import NoReturn

    import click

    from converters.errors import ConvertError, os_hint
except KeyboardInterrupt:
    sys.stderr.write("interrupted\n")
    raise SystemExit(EXIT_INTERRUPTED) from None

# name -> first line of its help, so that listing the commands imports none of them. A test holds
# these lines equal to the commands' docstrings.
COMMANDS = {
    "export": "Write a checkpoint as GGUF, ONNX or safetensors, with its RoPE interpolated.",
    "finetune": "Fine-tune a model after Position Interpolation.",
    "verify": "Prove that an artifact is its source with the expected RoPE.",
    "perplexity": "Perplexity over a sliding window, the same tokens scored at every context.",
    "passkey": "Retrieve a passkey from ever farther back, as the paper does.",
    "compare": "Compare two models on the same tokens: KL, agreement, paired NLL.",
    "probe": "Tell from the weights which factor a checkpoint was tuned with.",
    "bound": "Bound attention scores, interpolated and extrapolated, by the paper's theorem.",
    "inspect": "Describe any source or artifact: architecture, RoPE, contexts, tensors, sizes.",
    "check": "Audit a GGUF file of any architecture, or an ONNX file or folder of any tool.",
    "fix": "Repair a GGUF file's RoPE metadata; tensor bytes stay untouched.",
    "quants": "List every quantization type with its size for a model.",
    "doctor": "Show versions, libraries and devices, and what is missing.",
}

_log = logging.getLogger(__name__)


class LazyGroup(click.Group):
    """Commands are modules of ``pi_convert.commands``, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"pi_convert.commands.{cmd_name}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"pi_convert.commands.{cmd_name}.command is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"pi-convert {version('pi-convert')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", count=True, help="Log more to stderr; twice for all.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Show the version.",
)  # fmt: skip
def cli(verbose: int) -> None:
    """Extend a RoPE model's context by Position Interpolation, export it, and prove the result.

    MODEL is a Hugging Face folder, a GGUF file or a hub id. Left out: the checkpoint in the current
    folder; where there is none, the default model.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)


def main() -> NoReturn:
    """Runs the command line; known errors become one message and an exit code.

    A polite end from outside (SIGTERM, a closed terminal) is answered as a Ctrl-C.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    code = run(sys.argv[1:])
    if os.environ.get("WORLD_SIZE", "1") != "1":  # set by torchrun and accelerate launch
        _leave_at_once(code)
    sys.exit(code)


def _end(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave_at_once(code: int) -> NoReturn:
    """Ends one of several processes without taking the interpreter down first.

    A thread of gloo that still has a tensor to drop needs the interpreter for it, and aborts the
    process where that is on its way down; torchrun then ends the other processes too.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of a command line. Bugs keep their traceback; an ``OSError`` is none."""
    try:
        result = cli.main(arguments, prog_name="pi-convert", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _interrupted()
    except click.ClickException as error:
        error.show()
        if hint := _about_texts(error.message, arguments):
            _complain(f"hint: {hint}")
        return error.exit_code
    except ConvertError as error:
        return _failed(error.message, _about_texts(error.message, arguments) or error.hint)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        if error.errno is None:  # such as a library that cannot be loaded
            raise
        _log.debug("%s", error, exc_info=True)
        path = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return _failed(f"{path}{error.strerror}", os_hint(error, ""))
    return result if isinstance(result, int) else 0


def _about_texts(message: str, arguments: list[str]) -> str:
    """A hint where `--text *.txt` has left texts behind, one of them taken for a model."""
    if "--text" not in arguments:
        return ""
    from pi_convert.evaluate.texts import TEXT_SUFFIXES

    model, is_none, _ = message.partition(" is neither a folder nor")
    taken = is_none and model.lower().endswith((*TEXT_SUFFIXES, ".jsonl", ".parquet"))
    return _ONE_TEXT if taken or "unexpected extra argument" in message else ""


def _failed(message: str, hint: str) -> int:
    _complain(f"error: {message}")
    if hint:
        _complain(f"hint: {hint}")
    return EXIT_FAILURE


def _complain(text: str) -> None:
    encoding = sys.stderr.encoding or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=True)


def _interrupted() -> int:
    click.echo("interrupted; nothing half-written was left", err=True)
    return EXIT_INTERRUPTED
