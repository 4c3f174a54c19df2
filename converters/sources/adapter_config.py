"""What an adapter's adapter_config.json says: its base, its scale, and that it is plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.containers.strict_json import read_json_object
from converters.errors import SourceError, UnsupportedError, shown

ADAPTER_CONFIG = "adapter_config.json"

_INIT = "init_lora_weights"
# Keys of peft 0.21.2's LoraConfig that the tensors themselves answer, or that only training or
# another key's refused value gives a meaning.
_UNDERSTOOD = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# Keys with values of their own under which the merge is W + B A * scale.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # Inits that leave the base as it is: peft 0.21.2, tuners/lora/layer.py, update_layer.
    _INIT: (None, True, False, "gaussian", "eva", "orthogonal"),
}
# Any other key, also one that is not known here, may only say that something is off.
_OFF: tuple[object, ...] = (None, False, "", [], {})
# Inits that PEFT can save as plain LoRA: tuners/lora/model.py,
# _convert_state_dict_for_initial_model.
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A plain LoRA adapter's base (a folder or hub id as it is written) and scale."""

    base: str
    revision: str | None  # of a base on the hub
    alpha: float
    rslora: bool
    replaced: tuple[str, ...]  # modules_to_save: ends of the names of modules with weights anew
    keeps_tied: bool  # ensure_weight_tying

    def scale(self, rank: int) -> float:
        """Alpha / rank; the rank is the tensors' own, so that ``rank_pattern`` is heeded."""
        return self.alpha / math.sqrt(rank) if self.rslora else self.alpha / rank

    def unties(self, weight: str) -> bool:
        """Whether ``weight`` is a copy that no other module shares; as PEFT, by the name's end."""
        module = weight.removesuffix(".weight")
        return not self.keeps_tied and any(module.endswith(end) for end in self.replaced)


def read_adapter_config(where: Path) -> AdapterConfig:
    """The adapter_config.json at ``where``.

    Raises ``UnsupportedError`` for what is merged otherwise than W + B A * scale, and
    ``SourceError`` for a value that is none.
    """
    config = read_json_object(where)
    _require_plain(config, where)
    base, revision, alpha = (
        config.get(key) for key in ("base_model_name_or_path", "revision", "lora_alpha")
    )
    if not isinstance(base, str) or not base:
        raise SourceError(
            f"{where}: base_model_name_or_path is {shown(base)}",
            hint="State the folder or hub id of the model that it was trained on.",
        )
    if revision is not None and not isinstance(revision, str):
        raise SourceError(
            f"{where}: revision is {shown(revision)}",
            hint="Expected the base's branch, tag or commit on the hub, or null.",
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise SourceError(f"{where}: lora_alpha is {shown(alpha)}", hint="Expected a number.")
    return AdapterConfig(
        base=base,
        revision=revision or None,
        alpha=float(alpha),
        rslora=bool(config.get("use_rslora")),
        replaced=_names(config.get("modules_to_save"), where),
        keeps_tied=bool(config.get("ensure_weight_tying")),
    )


def _names(value: object, where: Path) -> tuple[str, ...]:
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(
            f"{where}: modules_to_save is {shown(value)}", hint="Expected a list of names, or null."
        )
    return tuple(names)


def _require_plain(config: Mapping[str, object], where: Path) -> None:
    """Raises ``UnsupportedError`` for the first options that are not known to be plain LoRA."""
    wrong = {
        key: config.get(key)
        for key in _PLAIN.keys() | config.keys()
        if key not in _UNDERSTOOD and not _is_plain(key, config.get(key))
    }
    if wrong:
        listed = ", ".join(f"{key} is {shown(wrong[key])}" for key in sorted(wrong))
        raise UnsupportedError(f"{where}: {listed}", hint=_hint(wrong))


def _is_plain(key: str, value: object) -> bool:
    return any(value is off or value == off for off in _PLAIN.get(key, _OFF))


def _hint(wrong: Mapping[str, object]) -> str:
    init = wrong.get(_INIT)
    if len(wrong) == 1 and isinstance(init, str) and init.lower().startswith(_CONVERTIBLE):
        return (
            "PEFT changed the base before it trained. Save a plain LoRA from PEFT, with"
            " save_pretrained(OUT, path_initial_model_for_weight_conversion=FOLDER), FOLDER being"
            f" the untrained adapter saved with {_INIT} True; or merge it with PEFT and give the"
            " folder that it saves."
        )
    return (
        "Only plain LoRA adapters are merged; merge this one with PEFT itself and give the folder"
        " that it saves."
    )
