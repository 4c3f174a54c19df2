"""The small files by which each client recognises the folder.

ONNX Runtime needs none of them; onnxruntime-genai reads genai_config.json; optimum and
transformers.js read config.json and the tokenizer's files. Checked with onnxruntime-genai 0.18,
optimum-onnx 0.1.0 and transformers.js 4.3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from converters.checkpoint import Checkpoint
from converters.containers.strict_json import parse_json_object
from converters.targets.huggingface import SPECIAL_ID_KEYS, folder_config, tokenizer_files
from converters.targets.onnx.plan import OnnxPlan
from converters.tokenizers import build_tokenizer_files

GRAPHS = "onnx"  # the subfolder where optimum and transformers.js look for graphs
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_EOS_KEY = SPECIAL_ID_KEYS["eos"]
_TOKENIZER_DEFAULTS = {
    # A graph has no token_type_ids, which PreTrainedTokenizerFast gives out if nobody says so.
    "model_input_names": ["input_ids", "attention_mask"],
    # A generation goes on after the last column, in transformers and transformers.js alike.
    "padding_side": "left",
}


def client_files(checkpoint: Checkpoint, plans: Sequence[OnnxPlan]) -> dict[str, bytes]:
    """File name to content; the first plan is the one that onnxruntime-genai opens."""
    generation = _generation_config(checkpoint)
    files = {_GENERATION: _json(generation), **checkpoint.side_files}
    files |= _tokenizer(checkpoint)
    files["config.json"] = _json(_config(checkpoint, plans))
    files["genai_config.json"] = _json(_genai_config(checkpoint, plans[0], generation))
    return files


def _config(checkpoint: Checkpoint, plans: Sequence[OnnxPlan]) -> dict[str, object]:
    """transformers.js finds a data file, and the cache's type, by these keys alone."""
    known = {
        "use_external_data_format": {plan.precision.file_name: 1 for plan in plans},
        "kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"},
    }
    return {**folder_config(checkpoint), "transformers.js_config": known}


def _tokenizer(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's files as for safetensors, and what clients of generation need beside.

    Without a tokenizer.json neither onnxruntime-genai nor transformers.js has a tokenizer.
    """
    files = tokenizer_files(checkpoint.vocabulary, checkpoint.rope.context)
    if _TOKENIZER not in files:
        files = build_tokenizer_files(checkpoint.vocabulary) | files
    settings = parse_json_object(files.get(_TOKENIZER_CONFIG, b"{}"), _TOKENIZER_CONFIG)
    # transformers 5 writes TokenizersBackend, which optimum's transformers 4 does not know.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key, value in _TOKENIZER_DEFAULTS.items():
        settings.setdefault(key, value)
    template = files.get(_TEMPLATE)
    if template is not None and "chat_template" not in settings:
        settings["chat_template"] = template.decode()  # transformers.js reads it here only
    files[_TOKENIZER_CONFIG] = _json(settings)
    return files


def _generation_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The source's own; else what its config.json says, which transformers would go by then.

    A chat model ends its turn with another token than a text: both end a generation.
    """
    own = checkpoint.side_files.get(_GENERATION)
    if own is not None:
        return parse_json_object(own, _GENERATION)
    ids, config = checkpoint.vocabulary.special_ids, folder_config(checkpoint)
    found: dict[str, object] = {key: ids[n] for n, key in SPECIAL_ID_KEYS.items() if n in ids}
    found |= {key: config[key] for key in SPECIAL_ID_KEYS.values() if config.get(key) is not None}
    end, turn_end = found.get(_EOS_KEY), ids.get("eot")
    if isinstance(end, int) and turn_end not in (None, end):
        found[_EOS_KEY] = [end, turn_end]
    return found


def _genai_config(
    checkpoint: Checkpoint, plan: OnnxPlan, generation: Mapping[str, object]
) -> dict[str, object]:
    """onnxruntime-genai's description of the model (its ``Config`` in src/config.h)."""
    sizes, ids = checkpoint.hparams, checkpoint.vocabulary.special_ids
    context = checkpoint.rope.context
    stated = {name: generation.get(key) for name, key in SPECIAL_ID_KEYS.items()}
    known = {**ids, **{name: value for name, value in stated.items() if value is not None}}
    ends = known.get("eos", 0)
    eos = ends[0] if isinstance(ends, list) and ends else ends
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{GRAPHS}/{plan.precision.file_name}",
        "head_size": sizes.head_dim,
        "hidden_size": sizes.hidden_size,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": "llama",
            "bos_token_id": known.get("bos", eos),
            "eos_token_id": ends,
            "pad_token_id": known.get("padding", eos),
            "context_length": context,
            "vocab_size": sizes.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
        },
    }


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
