"""Answers a request (tests/clients/protocol.py) with onnxruntime-genai."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def main(request, ends):
    model = _open(request)
    tokenizer = og.Tokenizer(model)
    texts, new_tokens = request["texts"], request["new_tokens"]

    def continued(ids):
        generator = _generator(model, 1, len(ids) + new_tokens)
        generator.append_tokens(ids)
        return _without_end(_run(generator, 1)[0][len(ids) :], ends)

    encoded = [_ids(tokenizer.encode(text)) for text in texts]
    width = max(map(len, encoded))
    generator = _generator(model, len(texts), width + new_tokens)
    generator.append_tokens(tokenizer.encode_batch(texts))  # padded on the right
    logits = np.asarray(generator.get_output("logits"))
    for i, ids in enumerate(encoded):
        row = logits[i, : len(ids)].astype("<f4")
        row.tofile(Path(request["out"]) / f"logits-{i}.f32")
    batch = [_without_end(row[width:], ends) for row in _run(generator, len(texts))]
    prompt, reply = [], []
    if request["messages"]:
        messages = json.dumps(request["messages"])
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        prompt = _ids(tokenizer.encode(rendered))
        reply = continued(prompt)
    return {
        "client": f"onnxruntime-genai {version('onnxruntime-genai')}",
        "encoded": encoded,
        "alone": [continued(ids) for ids in encoded],
        "batch": batch,
        "beams": [],
        "prompt": prompt,
        "reply": reply,
        "vocabulary": logits.shape[-1],
    }


def _open(request):
    if request["file"] is None:
        return og.Model(request["folder"])
    config = og.Config(request["folder"])
    filename = f"onnx/{request['file']}"
    config.overlay(json.dumps({"model": {"decoder": {"filename": filename}}}))
    return og.Model(config)


def _generator(model, batch_size, max_length):
    """Greedy, which is what the folder says; only the room for the cache is given."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=batch_size, max_length=max_length)
    return og.Generator(model, parameters)


def _run(generator, rows):
    while not generator.is_done():
        generator.generate_next_token()
    return [_ids(generator.get_sequence(i)) for i in range(rows)]


def _without_end(ids, ends):
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _ids(found):
    return [int(token) for token in found]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    config = json.loads((Path(asked["folder"]) / "genai_config.json").read_text("utf-8"))
    answer = main(asked, np.atleast_1d(config["model"]["eos_token_id"]).tolist())
    (Path(asked["out"]) / "answer.json").write_text(json.dumps(answer), "utf-8")
