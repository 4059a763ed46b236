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

// A call that is forced, whole, streamed, and folded by the client's helper.
const tools = [{ type: "function", function: { name: "look_up", parameters: { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false } } }];
const forced = { ...greedy, tools, tool_choice: { type: "function", function: { name: "look_up" } }, max_tokens: 48 };
seen.call = (await client.chat.completions.create(forced)).choices[0];
seen.call_deltas = [];
seen.call_finish = null;
for await (const chunk of await client.chat.completions.create({ ...forced, stream: true })) {
  seen.call_deltas.push(...(chunk.choices[0].delta.tool_calls ?? []));
  seen.call_finish ??= chunk.choices[0].finish_reason;
}
seen.call_folded = (await client.chat.completions.stream(forced).finalChatCompletion()).choices[0];

// The helper that calls the function, and gives the model its result.
seen.asked = [];
const look_up = { type: "function", function: { ...tools[0].function, parse: JSON.parse, function: ({ city }) => (seen.asked.push(city), "France") } };
const agent = client.chat.completions.runTools({ ...forced, tools: [look_up] }, { maxChatCompletions: 1 });
await agent.done();
seen.agent = agent.messages.map((message) => message.role);

// A schema without a library.
const schema = { type: "object", properties: { country: { enum: ["France", "Italy"] }, sure: { type: "boolean" } }, required: ["country", "sure"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
seen.formatted = (await client.chat.completions.create({ ...greedy, response_format, max_tokens: 48 })).choices[0];
seen.parsed = (await client.chat.completions.parse({ ...greedy, response_format, max_tokens: 48 })).choices[0].message.parsed;
seen.keyword = await failed(() => client.chat.completions.create({ ...greedy, response_format: { type: "json_schema", json_schema: { name: "x", schema: { not: {} } } } }));

// A stream that its reader leaves.
const left = await client.chat.completions.create({ ...greedy, max_tokens: 1000, stream: true });
let pieces = 0;
for await (const _ of left) if (++pieces === 3) break;
seen.pieces = pieces;

console.log(JSON.stringify(seen));
