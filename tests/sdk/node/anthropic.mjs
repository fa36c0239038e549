import Anthropic from "@anthropic-ai/sdk";

import { codes, collect, finish, keys, maxBodyBytes, record, refusal, url } from "./report.mjs";

const connect = (key) => (fetch) =>
  new Anthropic({ baseURL: url, apiKey: keys[key], maxRetries: 2, ...(fetch ? { fetch } : {}) });
const client = connect("dev")();

const model = "mock-claude";
const max_tokens = 100;
const messages = [{ role: "user", content: "Hi there" }];
const asked = [{ role: "user", content: "Please call get_weather and get_time." }];
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = ["get_weather", "get_time"].map((name) => ({ name, input_schema }));
const textOf = (message) => message.content.map((block) => block.text ?? "").join("");
const usesOf = (message) => message.content.map((block) => [block.name, block.input]);

await record("message", async () => {
  const message = await client.messages.create({ model, max_tokens, messages });
  return { text: textOf(message), hasUsage: message.usage.output_tokens > 0 };
});
await record("message stream", async () => {
  const events = await collect(await client.messages.create({ model, max_tokens, messages, stream: true }));
  return [events[0].type, ...events.slice(-3).map((event) => event.type)];
});
await record("message stream helper", async () =>
  textOf(await client.messages.stream({ model, max_tokens, messages }).finalMessage()),
);
await record("tools", async () => [
  usesOf(await client.messages.create({ model, max_tokens, messages: asked, tools })),
  usesOf(await client.messages.stream({ model, max_tokens, messages: asked, tools }).finalMessage()),
]);
await record("count", async () => (await client.messages.countTokens({ model, messages })).input_tokens);
await record("models", async () => (await collect(client.models.list())).map((listed) => listed.id));
await record("headers", async () => {
  const { data, response } = await client.messages.create({ model, max_tokens, messages }).withResponse();
  return {
    text: textOf(data),
    provider: response.headers.get("x-penstock-provider"),
    model: response.headers.get("x-penstock-model"),
    request: response.headers.get("x-penstock-request-id"),
  };
});

const ask = (name, content = "Hi there", options = {}) => (made) =>
  made.messages.create({ model: name, max_tokens, messages: [{ role: "user", content }] }, options);
const refusals = [
  ["invalid_api_key", "unknown", ask(model)],
  ["virtual_key_revoked", "revoked", ask(model)],
  ["virtual_key_disabled", "disabled", ask(model)],
  ["virtual_key_expired", "expired", ask(model)],
  ["model_not_allowed", "limited", ask(model)],
  ["missing_model", "dev", ask("")],
  ["model_not_recognized", "declared", ask("other-model")],
  ["provider_not_bound", "dev", ask("anthropic/claude-haiku-4-5")],
  ["bad_request", "dev", (made) => made.post("/v1/messages", { body: [1] })],
  ["payload_too_large", "dev", ask(model, "x".repeat(40 * maxBodyBytes))],
  ["unsupported_encoding", "dev", ask(model, "Hi", { headers: { "content-encoding": "x-own" } })],
  ["not_found", "dev", (made) => made.messages.batches.list()],
  ["method_not_allowed", "dev", (made) => made.get("/v1/messages")],
  ["provider_error", "dead", ask(model)],
  ["upstream_timeout", "impatient", ask(model)],
];
for (const [code, key, call] of refusals) await refusal(`caused ${code}`, connect(key), call);
for (const code of codes) {
  await refusal(`refused ${code}`, connect("dev"), ask(model, "Hi", { headers: { "x-test-refuse": code } }));
}
for (const status of [400, 429, 503, 529]) {
  await refusal(`provider ${status}`, connect("dev"), ask(`mock/fault-${status}`));
}
await refusal("cut stream", connect("dev"), async (made) =>
  collect(await made.messages.create({ model: "mock/cut", max_tokens, messages, stream: true })),
);
await refusal("cut stream helper", connect("dev"), (made) =>
  made.messages.stream({ model: "mock/cut", max_tokens, messages }).finalMessage(),
);
finish();
