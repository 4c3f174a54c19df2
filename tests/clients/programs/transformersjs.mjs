// Answers a request (tests/clients/protocol.py) with transformers.js, in Node and in a browser alike.

// How transformers.js asks for a file of the folder.
const DTYPES = {
  "model.onnx": "fp32",
  "model_fp16.onnx": "fp16",
  "model_quantized.onnx": "q8",
  "model_q4.onnx": "q4",
};

/**
 * `library` is transformers.js with its env set, `name` the folder's, `device` as in
 * from_pretrained; `save(name, Float32Array)` keeps an array.
 */
export async function answer(library, request, { name, device, save }) {
  const { AutoModelForCausalLM, AutoTokenizer } = library;
  const dtype = request.file === null ? undefined : DTYPES[request.file];
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name, { device, dtype });
  const ends = [model.generation_config.eos_token_id].flat();

  const generate = async (inputs) => {
    const found = await model.generate({ ...inputs, max_new_tokens: request.new_tokens });
    const width = inputs.input_ids.dims[1];
    return found.tolist().map((row) => withoutEnd(numbers(row.slice(width)), ends));
  };

  const batch = tokenizer(request.texts, { padding: true });
  const masks = batch.attention_mask.tolist().map(numbers);
  if (masks.every((mask) => mask[0] === 1)) throw new Error("expected a batch padded on the left");
  const { logits } = await model(batch);
  const [, width, vocabulary] = logits.dims;
  for (const [i, mask] of masks.entries()) {
    const start = (i * width + mask.indexOf(1)) * vocabulary;
    await save(`logits-${i}.f32`, logits.data.slice(start, (i + 1) * width * vocabulary));
  }

  let [prompt, reply] = [[], []];
  if (request.messages.length) {
    const options = { add_generation_prompt: true, return_dict: true };
    const inputs = tokenizer.apply_chat_template(request.messages, options);
    prompt = numbers(inputs.input_ids.tolist()[0]);
    [reply] = await generate(inputs);
  }
  const alone = [];
  for (const text of request.texts) alone.push((await generate(tokenizer(text)))[0]);
  return {
    client: `transformers.js ${library.env.version}`,
    encoded: request.texts.map((text) => numbers(tokenizer(text).input_ids.tolist()[0])),
    alone,
    batch: await generate(batch),
    beams: [],
    prompt,
    reply,
    vocabulary,
  };
}

function numbers(row) {
  return row.map(Number);
}

function withoutEnd(ids, ends) {
  const end = ids.findIndex((id) => ends.includes(id));
  return end < 0 ? ids : ids.slice(0, end);
}
