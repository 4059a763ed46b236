// The official Node client against the server at argv[2]; prints what it saw as one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "any", maxRetries: 0, timeout: 120000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model: "smollm2-135m-instruct", messages, temperature: 0, max_tokens: 8 };
const seen = {};

seen.chat = await client.chat.completions.create(greedy);

seen.stream = { text: "", roles: [], finish: null, usage: null };
for await (const chunk of await client.chat.completions.create({
  ...greedy,
  stream: true,
  stream_options: { include_usage: true },
})) {
  for (const choice of chunk.choices) {
    if (choice.delta.role) seen.stream.roles.push(choice.delta.role);
    seen.stream.text += choice.delta.content ?? "";
    seen.stream.finish ??= choice.finish_reason;
  }
  seen.stream.usage ??= chunk.usage;
}

// The helper that folds a stream itself, with its events.
const runner = client.chat.completions.stream(greedy);
seen.folded = (await runner.finalChatCompletion()).choices[0].message.content;

seen.completion = await client.completions.create({ model: "any", prompt: "Once upon a time", max_tokens: 4 });

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);
seen.model = (await client.models.retrieve(seen.models[0])).object;

const failed = async (work) => {
  try {
    await work();
    return null;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param, type: error.type };
  }
};
seen.overflow = await failed(() => client.chat.completions.create({ ...greedy, max_tokens: 1000000 }));
seen.range = await failed(() => client.chat.completions.create({ ...greedy, temperature: 9 }));
seen.missing = await failed(() => client.models.retrieve("nobody"));
seen.embeddings = await failed(() => client.embeddings.create({ model: seen.models[0], input: "x" }));
const vectors = {};
for (const encoding_format of [undefined, "float", "base64"])
  vectors[encoding_format ?? "default"] = (await client.embeddings.create({ model: "all-minilm-l6-v2", input: ["a cat", "a dog"], encoding_format })).data;
seen.vectors = vectors;

// A stream that its reader leaves.
const left = await client.chat.completions.create({ ...greedy, max_tokens: 1000, stream: true });
let pieces = 0;
for await (const _ of left) if (++pieces === 3) break;
seen.pieces = pieces;

console.log(JSON.stringify(seen));
