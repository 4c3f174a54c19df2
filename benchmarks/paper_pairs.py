"""Changes between models of `benchmarks/paper.py`, paired token by token.

`pi-convert perplexity` pairs models at one window, and windows of one model. The paper's claims lay
a model at its new window against another one at the old: the same tokens again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi_convert.commands._measuring import RunOptions
from pi_convert.commands._models import Opening, open_models
from pi_convert.evaluate.models import Workbench, require_same_tokens
from pi_convert.evaluate.perplexity import plan_windows, score_windows
from pi_convert.evaluate.statistics import clustered_mean
from pi_convert.evaluate.texts import read_documents

At = tuple[Path, int]  # a model's folder and the window it is given
_OPTIONS = RunOptions("cpu", None, 512, None, "f16", None)


def paired_changes(
    pairs: Mapping[str, tuple[At, At]],
    texts: Sequence[Path],
    contexts: Sequence[int],
    *,
    stride: int,
    most: int,
) -> dict[str, dict[str, Any]]:
    """By name: the change of NLL from the first to the second, with its interval by document.

    The tokens are those that `pi-convert perplexity` scores at ``contexts`` (tokens a window).
    """
    wanted = sorted({at for pair in pairs.values() for at in pair})
    documents = read_documents(texts)
    scores = {}
    with Workbench() as bench:
        for folder in sorted({folder for folder, _ in wanted}):
            models = open_models([(str(folder), Opening(_OPTIONS))])
            runs = require_same_tokens(models, documents)
            plan = plan_windows(runs, contexts, stride=stride, most=most)
            runtime = bench.runtime(models[0])
            for context in (context for path, context in wanted if path == folder):
                scores[folder, context] = score_windows(runtime, plan.windows(context), "")
    found = {}
    for name, (first, second) in pairs.items():
        (before, document), (after, _) = scores[first], scores[second]
        change = clustered_mean(after - before, document)
        found[name] = {"value": change.value, "interval": change.interval}
    return found
