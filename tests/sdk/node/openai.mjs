import OpenAI, { toFile } from "openai";

import { codes, collect, finish, keys, maxBodyBytes, record, refusal, url } from "./report.mjs";

const connect = (key) => (fetch) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: keys[key], maxRetries: 2, ...(fetch ? { fetch } : {}) });
const client = connect("dev")();

const model = "mock-gpt";
const messages = [{ role: "user", content: "Hi there" }];
const asking = "Please call get_weather and get_time.";
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const names = ["get_weather", "get_time"];
const tools = names.map((name) => ({ type: "function", function: { name, parameters, strict: true } }));
const functions = names.map((name) => ({ type: "function", name, parameters, strict: true }));
const calls = (message) => message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);

await record("chat", async () => {
  const completion = await client.chat.completions.create({ model, messages });
  return { text: completion.choices[0].message.content, hasUsage: completion.usage.total_tokens > 0 };
});
await record("chat stream", async () => {
  const chunks = await collect(await client.chat.completions.create({ model, messages, stream: true }));
  return {
    text: chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""),
    withUsage: chunks.filter((chunk) => "usage" in chunk).length,
  };
});
await record("chat stream with usage", async () => {
  const stream_options = { include_usage: true };
  const chunks = await collect(await client.chat.completions.create({ model, messages, stream: true, stream_options }));
  const last = chunks.at(-1);
  return {
    withoutChoices: chunks.filter((chunk) => chunk.choices.length === 0).length,
    last: [last.choices.length, last.usage.total_tokens > 0],
  };
});
await record("chat stream helper", async () => {
  const completion = await client.chat.completions.stream({ model, messages }).finalChatCompletion();
  return completion.choices[0].message.content;
});
await record("chat tools", async () => {
  const asked = [{ role: "user", content: asking }];
  const whole = await client.chat.completions.create({ model, messages: asked, tools });
  const streamed = await client.chat.completions.stream({ model, messages: asked, tools }).finalChatCompletion();
  return [calls(whole.choices[0].message), calls(streamed.choices[0].message)];
});
await record("responses", async () => {
  const response = await client.responses.create({ model, input: "Hi there" });
  const found = await client.responses.retrieve(response.id);
  return [response.output_text, found.output_text];
});
await record("responses stream", async () => {
  const events = await collect(await client.responses.create({ model, input: "Hi there", stream: true }));
  return [events[0].type, events.at(-1).type, events.every((event, index) => event.sequence_number === index)];
});
await record("responses stream helper", async () => {
  const text = await client.responses.stream({ model, input: "Hi there" }).finalResponse();
  const called = await client.responses.stream({ model, input: asking, tools: functions }).finalResponse();
  return { text: text.output_text, calls: called.output.map((item) => [item.name, JSON.parse(item.arguments)]) };
});
await record("embeddings", async () => {
  const embedded = await client.embeddings.create({ model: "mock-embedding", input: ["a", "b"], dimensions: 8 });
  return embedded.data.map((row) => row.embedding.length);
});
await record("models", async () => (await collect(client.models.list())).map((listed) => listed.id));
await record("transcription", async () => {
  const file = await toFile(Buffer.alloc(100), "speech.wav");
  return (await client.audio.transcriptions.create({ model: "mock-voice", file })).text;
});
await record("headers", async () => {
  const { data, response } = await client.chat.completions.create({ model, messages }).withResponse();
  return {
    text: data.choices[0].message.content,
    provider: response.headers.get("x-penstock-provider"),
    model: response.headers.get("x-penstock-model"),
    request: response.headers.get("x-penstock-request-id"),
  };
});

const chat = (asked, content = "Hi there", options = {}) => (made) =>
  made.chat.completions.create({ model: asked, messages: [{ role: "user", content }] }, options);
const refusals = [
  ["invalid_api_key", "unknown", chat(model)],
  ["virtual_key_revoked", "revoked", chat(model)],
  ["virtual_key_disabled", "disabled", chat(model)],
  ["virtual_key_expired", "expired", chat(model)],
  ["model_not_allowed", "limited", chat(model)],
  ["missing_model", "dev", chat("")],
  ["model_not_recognized", "declared", chat("other-model")],
  ["provider_not_bound", "dev", chat("openai/gpt-5-mini")],
  ["bad_request", "dev", (made) => made.post("/chat/completions", { body: [1] })],
  ["payload_too_large", "dev", chat(model, "x".repeat(40 * maxBodyBytes))],
  ["unsupported_encoding", "dev", chat(model, "Hi", { headers: { "content-encoding": "x-own" } })],
  ["not_found", "dev", (made) => made.files.list()],
  ["method_not_allowed", "dev", (made) => made.models.delete(model)],
  ["provider_error", "dead", chat(model)],
  ["upstream_timeout", "impatient", chat(model)],
];
for (const [code, key, ask] of refusals) await refusal(`caused ${code}`, connect(key), ask);
for (const code of codes) {
  await refusal(`refused ${code}`, connect("dev"), chat(model, "Hi", { headers: { "x-test-refuse": code } }));
}
for (const status of [400, 429, 503, 529]) {
  await refusal(`provider ${status}`, connect("dev"), chat(`mock/fault-${status}`));
}
await refusal("cut chat stream", connect("dev"), async (made) =>
  collect(await made.chat.completions.create({ model: "mock/cut", messages, stream: true })),
);
await refusal("cut responses stream", connect("dev"), async (made) =>
  collect(await made.responses.create({ model: "mock/cut", input: "Hi there", stream: true })),
);
await refusal("cut chat stream helper", connect("dev"), (made) =>
  made.chat.completions.stream({ model: "mock/cut", messages }).finalChatCompletion(),
);
finish();
