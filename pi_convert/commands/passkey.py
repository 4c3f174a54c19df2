"""``pi-convert passkey``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from pi_convert.commands._measuring import (
    report_option,
    require_report,
    run_options,
    runtime_option,
    take,
    take_run,
    write_page,
)
from pi_convert.commands.options import (
    FiniteRange,
    json_option,
    original_context_option,
    revision_option,
    scale_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pi_convert.evaluate.models import Model
    from pi_convert.evaluate.passkey import Passkey


@dataclass(frozen=True, slots=True)
class PasskeyOptions:
    """What the command line asked for."""

    max_context: int
    depths: int
    trials: int
    budget: float | None  # minutes a model
    seed: int
    extrapolate: bool


@click.command()
@click.argument("models", metavar="[MODEL|ARTIFACT]...", nargs=-1)
@click.option(
    "--max-context",
    type=click.IntRange(min=2, max=2**31 - 1),
    required=True,
    metavar="N",
    help="Tokens of a prompt with its answer, at most; distances are uniform over it.",
)
@click.option(
    "--depths",
    type=click.IntRange(min=2),
    default=32,
    metavar="N",
    help="Distances of the passkey from the end; fewer where the context has fewer lines of filler."
    " Default: 32, the paper's.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=10,
    metavar="N",
    help="Random passkeys at each distance. Default: 10, the paper's.",
)
@click.option(
    "--budget",
    type=FiniteRange(min=0, min_open=True),
    metavar="MINUTES",
    help="Fewer trials, then fewer distances, so that a model takes no longer than this.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Of the passkeys. Default: 0.")
@click.option("--extrapolate", is_flag=True, help="Allow a context past L'.")
@scale_option(required=False, help="Interpolate models that torch runs, without fine-tuning.")
@runtime_option()
@original_context_option
@revision_option
@run_options
@report_option
@json_option
def command(
    *,
    models: tuple[str, ...],
    scale: float | None,
    runtime: str | None,
    original_context: int | None,
    revision: str | None,
    report: Path | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Retrieve a passkey from ever farther back, as the paper does.

    Five random digits are told once in a long filler text and asked for at its end. For each
    distance: the share of trials in which greedy decoding gives the digits, with Wilson's 95 %
    interval, and the log-probability of the right digits; k_max is the largest distance up to which
    every share is 20 % or more. One pass over prompt and answer gives both: nothing is generated.
    The time is measured and printed first; --budget limits it.

    \b
    Examples:
      pi-convert passkey model-PI8.gguf --max-context 16384 --budget 30
      pi-convert passkey ./base ./tuned --max-context 4096 --extrapolate
    """
    from pi_convert.commands._models import Opening, open_models, record, require_contexts
    from pi_convert.report.console import emit_json
    from pi_convert.report.passkey import PasskeyReport
    from pi_convert.report.passkey_page import passkey_page

    require_report(report, force=force)
    options = PasskeyOptions(**take(flags, PasskeyOptions))
    opening = Opening(take_run(flags), scale, runtime, revision, original_context)
    opened = open_models([(model, opening) for model in models or (None,)])
    require_contexts(opened, options.max_context, extrapolate=options.extrapolate)
    measured = _measure(opened, options, as_json=as_json)
    asked = (options.depths, options.trials)
    ran = record(opened, opening, asdict(options))
    found = PasskeyReport(options.max_context, asked, measured, ran)
    if as_json:
        emit_json(found.to_json())
    if report is not None:
        write_page(passkey_page(found), report, force=force)


def _measure(
    models: Sequence[Model], options: PasskeyOptions, *, as_json: bool
) -> list[tuple[Model, Passkey]]:
    from pi_convert.evaluate.cost import measure_speed
    from pi_convert.evaluate.models import Workbench, require_vocabulary
    from pi_convert.evaluate.passkey import measure_passkey, plan_passkey, within_budget
    from pi_convert.report.console import emit, progress
    from pi_convert.report.passkey import distances_text, passkey_text, plan_text

    asked, context = (options.depths, options.trials), options.max_context
    planned = []
    for model in models:  # all of them before any work: a prompt may not fit
        plan = plan_passkey(model, context, depths=asked[0], trials=asked[1], seed=options.seed)
        planned.append((model, plan))
    found = []
    with progress() as tell, Workbench(tell) as bench:
        for model, plan in planned:
            runtime = bench.runtime(model)
            require_vocabulary(model, runtime, (prompt.tokens for prompt in plan.prompts))
            speed = measure_speed(model, runtime)
            lacking = distances_text(plan, asked[0])
            if options.budget is not None:
                seconds, seed = 60 * options.budget, options.seed
                plan = within_budget(model, context, plan, speed, seconds, seed=seed)  # noqa: PLW2901
            click.echo(f"cost: {plan_text(plan, asked, plan.seconds(speed))}{lacking}", err=True)
            found.append((model, measure_passkey(runtime, plan, tell, f"{model.name}: ")))
            if not as_json:
                emit(passkey_text(*found[-1]))
    return found
