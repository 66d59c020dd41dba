// A client for a web page or for Node 18 and newer; no package is needed. In a page:
//   <script type="module">
//   import { predict } from "./client.js";
//   const answer = await predict("https://api.pillsnap.co.kr", key, input.files[0]);
//   </script>
// The page's origin has to stand in CORS_ALLOW_ORIGINS. A key in a page can be read by everyone who opens the page: let
// your own server ask, or use a key that only your network can use.
// From a shell: API_KEY=... node examples/client.js http://127.0.0.1:8000 photo.jpg, or photos.zip for a job.

export class PillsnapError extends Error {
  constructor(status, body) {
    super(body.detail ?? `status ${status}`);
    this.status = status;
    this.code = body.code;
  }
}

async function call(url, key, options = {}) {
  const headers = { "X-API-Key": key, ...options.headers };
  for (let attempt = 1; ; attempt += 1) {
    const response = await fetch(url, { ...options, headers });
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    const wait = Number(response.headers.get("Retry-After"));
    if (response.status !== 503 || !wait || attempt === 3) throw new PillsnapError(response.status, body);
    await pause(wait * 1000);
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** The pills of one photo: `image` is a File or a Blob; `options` are parameters of /predict. */
export async function predict(server, key, image, options = {}) {
  const body = new FormData();
  body.append("image", image);
  const query = new URLSearchParams(options);
  return (await call(`${server}/predict?${query}`, key, { method: "POST", body })).json();
}

/** Send a ZIP of photos as a job; `options` are kind, pipeline, top_k... */
export async function sendJob(server, key, zip, options = {}) {
  const headers = { "Content-Type": "application/zip" };
  const query = new URLSearchParams(options);
  return (await call(`${server}/jobs?${query}`, key, { method: "POST", body: zip, headers })).json();
}

/** Wait for the end of a job; `onProgress` gets each state. */
export async function waitForJob(server, key, id, onProgress = () => {}, milliseconds = 1000) {
  for (;;) {
    const job = await (await call(`${server}/jobs/${id}`, key)).json();
    onProgress(job);
    if (!["queued", "running"].includes(job.state)) return job;
    await pause(milliseconds);
  }
}

/** The answers of a job of kind predict, in the order of the ZIP: photo, prediction, problem. */
export async function answersOf(server, key, job) {
  const text = await (await call(server + job.result_url, key)).text();
  return text.trimEnd().split("\n").map((line) => JSON.parse(line));
}

async function main([server, file]) {
  const { readFile } = await import("node:fs/promises");
  const key = process.env.API_KEY ?? "";
  const content = new Blob([await readFile(file)]);
  if (!file.toLowerCase().endsWith(".zip")) {
    for (const pill of (await predict(server, key, content, { pipeline: "combo" })).pills) {
      console.log(`${pill.code} ${pill.name} ${Math.floor(pill.confidence * 100)}% ${pill.verdict}`);
    }
    return;
  }
  const sent = await sendJob(server, key, content);
  const job = await waitForJob(server, key, sent.id, (now) => console.error(`${now.state} ${now.done}/${now.total}`));
  if (job.state !== "done") throw new Error(job.problem ?? job.state);
  for (const answer of await answersOf(server, key, job)) {
    const said = answer.prediction ? answer.prediction.pills.map((pill) => pill.code).join(" ") : answer.problem.detail;
    console.log(`${answer.photo}: ${said}`);
  }
}

const fromShell = typeof process !== "undefined" && process.argv?.[1]?.endsWith("client.js");
if (fromShell) {
  main(process.argv.slice(2)).catch((error) => {
    console.error(error.message);
    process.exitCode = 1;
  });
}
