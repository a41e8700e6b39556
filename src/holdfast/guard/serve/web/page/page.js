"use strict";

const at = (id) => document.getElementById(id);
const state = { model: null, actsOn: null, limit: null, running: null, fired: false };

function headers() {
  const key = at("key").value;
  const all = { "content-type": "application/json" };
  if (key) all.authorization = `Bearer ${key}`;
  return all;
}

function tell(words, fired = false) {
  at("status").textContent = words;
  at("status").classList.toggle("fired", fired);
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function learn() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  const body = await response.json();
  const guard = body.holdfast;
  state.model = body.data[0].id;
  at("model").textContent = state.model;
  if (!guard || !guard.acts_on) {
    at("about").textContent = "Nothing is watched: the server was started without a guard.";
    return;
  }
  state.actsOn = guard.acts_on;
  state.limit = guard.thresholds[guard.acts_on];
  const stale = guard.stale.length ? ` Stale: ${guard.stale.join(" ")}` : "";
  at("about").textContent =
    `Every token is scored as it is written. The guard fires above ${round(state.limit)} ` +
    `(${guard.acts_on}); its policy is ${guard.policy}.${stale}`;
}

const round = (value) => (typeof value === "number" ? value.toPrecision(3) : "none");

// How near a score is to its threshold, from 0 (far below) to 1 (at it or over).
function nearness(score) {
  if (typeof score !== "number" || state.limit === null) return 0;
  const room = Math.abs(state.limit) + 1;
  return Math.min(1, Math.max(0, 1 + (score - state.limit) / room));
}

function span(text, step) {
  const made = document.createElement("span");
  made.textContent = text;
  if (step) {
    const score = step.scores[state.actsOn];
    made.className = `s${5 - Math.floor(5 * nearness(score))}`;
    made.title = `token ${step.index}: ${round(score)}`;
    // Who has fired stays so; the token at which it did is marked.
    if (step.fired.includes(state.actsOn) && !state.fired) {
      state.fired = true;
      made.classList.add("fired");
    }
  }
  return made;
}

function row(step, text) {
  const made = document.createElement("tr");
  const fired = step.fired.length ? step.fired.join(", ") : "no";
  for (const cell of [step.index, text, step.channel, round(step.scores[state.actsOn]), fired]) {
    made.insertCell().textContent = cell;
  }
  at("rows").append(made);
}

function show(chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  const choice = chunk.choices && chunk.choices[0];
  const delta = choice ? choice.delta : {};
  const thought = delta.reasoning_content || delta.reasoning || "";
  const said = delta.content || "";
  const steps = (chunk.holdfast && chunk.holdfast.steps) || [];
  const step = steps[steps.length - 1];
  if (thought) at("thinking").append(span(thought, step));
  if (said) at("answer").append(span(said, step));
  for (const each of steps) row(each, each === step ? thought + said : "");
  if (step) {
    const score = step.scores[state.actsOn];
    at("score").textContent = `${round(score)}, threshold ${round(state.limit)}`;
    at("meter").value = nearness(score);
  }
  const verdict = chunk.holdfast && chunk.holdfast.verdict;
  if (verdict) conclude(verdict, choice ? choice.finish_reason : null);
}

function conclude(verdict, finish) {
  const ends = { stop: "It ended by itself.", length: "It ended at its limit." };
  let words = ends[finish] || "";
  if (verdict.action) words = `The guard fired: the answer was ${verdict.action}.`;
  else if (verdict.flagged) words += " The guard fired, and let it go on.";
  else if (verdict.watched) words += " The guard did not fire.";
  else words += " It was not watched.";
  if (verdict.fault) words += ` ${verdict.fault}.`;
  if (verdict.abstains) words += ` Nothing is promised: ${verdict.abstains}.`;
  tell(words.trim(), verdict.flagged);
}

async function ask() {
  if (state.running) return;
  for (const id of ["thinking", "answer", "rows"]) at(id).replaceChildren();
  at("score").textContent = "None yet.";
  at("meter").value = 0;
  state.fired = false;
  state.running = new AbortController();
  at("send").disabled = true;
  at("end").disabled = false;
  tell("It is being written …");
  try {
    if (state.model === null) await learn();
    const body = {
      model: state.model,
      stream: true,
      messages: [{ role: "user", content: at("prompt").value }],
    };
    if (at("temperature").value) body.temperature = Number(at("temperature").value);
    if (at("seed").value) body.seed = Number(at("seed").value);
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: state.running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    await read(response.body);
  } catch (error) {
    tell(error.name === "AbortError" ? "You ended it." : `It failed: ${error.message}`);
  } finally {
    state.running = null;
    at("send").disabled = false;
    at("end").disabled = true;
  }
}

async function read(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) show(JSON.parse(line.slice(6)));
    }
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("end").addEventListener("click", () => state.running && state.running.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.running) state.running.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
learn().catch((error) => tell(`The server asks for a key, or is not there: ${error.message}`));
