"""Answers a request (tests/clients/protocol.py) with optimum-onnx on transformers 4."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main(request):
    folder, new_tokens = request["folder"], request["new_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = {} if request["file"] is None else {"file_name": request["file"]}
    model = ORTModelForCausalLM.from_pretrained(folder, **files)
    ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist()

    def generate(inputs, **settings):
        found = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **settings)
        rows = found[:, inputs["input_ids"].shape[1] :].tolist()
        return [_without_end(row, ends) for row in rows]

    batch = tokenizer(request["texts"], padding=True, return_tensors="pt")
    assert not batch["attention_mask"][:, 0].all(), "expected a batch padded on the left"
    logits = model(**batch).logits
    for i, mask in enumerate(batch["attention_mask"].bool()):
        row = logits[i, mask].numpy().astype("<f4")
        row.tofile(Path(request["out"]) / f"logits-{i}.f32")
    prompt, reply = [], []
    if request["messages"]:
        inputs = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        prompt, (reply,) = inputs["input_ids"][0].tolist(), generate(inputs)
    return {
        "client": f"optimum-onnx {version('optimum-onnx')}, transformers {version('transformers')}",
        "encoded": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "alone": [generate(tokenizer(text, return_tensors="pt"))[0] for text in request["texts"]],
        "batch": generate(batch),
        "beams": generate(batch, num_beams=request["beams"]) if request["beams"] else [],
        "prompt": prompt,
        "reply": reply,
        "vocabulary": logits.shape[-1],
    }


def _without_end(ids, ends):
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    (Path(asked["out"]) / "answer.json").write_text(json.dumps(main(asked)), "utf-8")
