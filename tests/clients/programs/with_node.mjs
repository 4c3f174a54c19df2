// node with_node.mjs REQUEST: transformers.js of the folder that CLIENT_MODULES names, offline.
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

import { answer } from "./transformersjs.mjs";

const request = JSON.parse(await readFile(process.argv[2], "utf-8"));
const { resolve } = createRequire(join(process.env.CLIENT_MODULES, "package.json"));
const library = await import(pathToFileURL(resolve("@huggingface/transformers")));

library.env.allowRemoteModels = false;
library.env.localModelPath = dirname(request.folder);
const save = (name, values) => writeFile(join(request.out, name), values);
const name = basename(request.folder);
const found = await answer(library, request, { name, device: "cpu", save });
await writeFile(join(request.out, "answer.json"), JSON.stringify(found));
