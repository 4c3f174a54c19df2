"""Answers a request (tests/clients/protocol.py) with onnxruntime alone; its texts are ids."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

PADDING = 0


def main(request):
    path = Path(request["folder"]) / "onnx" / request["file"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = [[int(token) for token in text.split()] for text in request["texts"]]
    width = max(map(len, rows))
    ids = np.array([[PADDING] * (width - len(row)) + row for row in rows], np.int64)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
    logits, batch = generate(session, ids, mask, request["new_tokens"])
    for i, row in enumerate(rows):
        real = logits[i, width - len(row) :].astype("<f4")
        real.tofile(Path(request["out"]) / f"logits-{i}.f32")
    alone = []
    for row in rows:
        ids = np.array([row], np.int64)
        alone += generate(session, ids, np.ones_like(ids), request["new_tokens"])[1]
    return {
        "client": f"onnxruntime {onnxruntime.__version__}",
        "encoded": rows,
        "alone": alone,
        "batch": batch,
        "beams": [],
        "prompt": [],
        "reply": [],
        "vocabulary": logits.shape[-1],
    }


def generate(session, ids, mask, new_tokens):
    """The logits of the prompt, and each row's greedy continuation."""
    names = [value.name for value in session.get_outputs()]
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), _dtype(value))
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    first, chosen = None, []
    for _ in range(new_tokens):
        found = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        outputs = dict(zip(names, found, strict=True))
        logits = outputs.pop("logits")
        first = logits if first is None else first
        ids = logits[:, -1].argmax(-1)[:, None]
        chosen.append(ids[:, 0].tolist())
        mask = np.concatenate([mask, np.ones((len(ids), 1), np.int64)], axis=1)
        past = {f"past_key_values{name[len('present') :]}": v for name, v in outputs.items()}
    return first, np.array(chosen).T.tolist()


def _dtype(value):
    return np.float16 if value.type == "tensor(float16)" else np.float32


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    (Path(asked["out"]) / "answer.json").write_text(json.dumps(main(asked)), "utf-8")
