// What both scripts share: where the gateway is, requests counted, and one JSON document of what came back.

export const { url, keys, codes, maxBodyBytes } = JSON.parse(process.env.SDK_TEST);

const results = {};

export async function record(name, ask) {
  try {
    results[name] = await ask();
  } catch (error) {
    results[name] = { unexpected: String(error?.stack ?? error) };
  }
}

// Record the exception that `ask` raises with a client of its own, and how many requests it took.
export async function refusal(name, connect, ask) {
  let attempts = 0;
  const counting = (...args) => {
    attempts += 1;
    return fetch(...args);
  };
  try {
    await ask(connect(counting));
    results[name] = { unexpected: "no error" };
  } catch (error) {
    results[name] = {
      class: error.constructor.name,
      status: error.status ?? null,
      code: error.code ?? error.error?.error?.code ?? null,
      type: error.type ?? null,
      header: error.headers?.get?.("x-penstock-error") ?? null,
      shouldRetry: error.headers?.get?.("x-should-retry") ?? null,
      namesRequest: Boolean(error.requestID) && error.requestID === error.headers?.get?.("x-penstock-request-id"),
      attempts,
    };
  }
}

export async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

export function finish() {
  process.stdout.write(`${JSON.stringify(results)}\n`);
}
