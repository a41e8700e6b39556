"use strict";
(() => {
  const PAGE = 50, SHORT = 600, SHOWN = 280, WAIT = 120;
  const byId = (name) => document.getElementById(name);
  const data = JSON.parse(byId("answers-data").textContent);
  const form = byId("answers-filter"), status = byId("answers-status");
  const table = byId("answers-table"), pages = byId("answers-pages");
  const body = table.tBodies[0];
  const [before, after] = pages.querySelectorAll("button");
  const place = pages.querySelector("span");
  let found = data.rows, page = 0, words = [], haystacks = null, timer = 0;

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const said = (text) => {
    const made = element("p", text, "said");
    made.dir = "auto";
    return made;
  };
  const holds = (text) => {
    const low = text.toLowerCase();
    return words.some((word) => low.includes(word));
  };
  const folded = (name, text, open) => {
    const made = element("details");
    made.append(element("summary", name), said(text));
    made.open = open;
    return made;
  };
  const whole = (cell, text) => {
    if (text.length <= SHORT) {
      cell.append(said(text));
      return;
    }
    const name = `All ${text.length.toLocaleString("en")} characters`;
    cell.append(said(text.slice(0, SHOWN) + "…"), folded(name, text, holds(text)));
  };
  const line = (row) => {
    const [group, wrapper, outcome, prompt, thinking, answer, note] = row;
    const made = element("tr"), head = element("th");
    head.scope = "row";
    head.append(element("span", data.groups[group]));
    head.append(element("span", data.wrappers[wrapper], "fine"));
    const judged = element("td", data.outcomes[outcome]);
    if (note) judged.append(element("span", note, "fine"));
    const asked = element("td"), told = element("td");
    whole(asked, prompt);
    if (thinking) {
      const name = `Thinking, ${thinking.length.toLocaleString("en")} characters`;
      told.append(folded(name, thinking, holds(thinking)));
    }
    if (answer) whole(told, answer);
    else told.append(element("span", "no answer", "fine"));
    made.append(head, judged, asked, told);
    return made;
  };
  const draw = () => {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    const first = page * PAGE, shown = found.slice(first, first + PAGE);
    body.replaceChildren(...shown.map(line));
    const count = (number) => number.toLocaleString("en");
    status.textContent = found.length
      ? `${count(first + 1)} to ${count(first + shown.length)} of ${count(found.length)} answers`
        + (found.length < data.rows.length ? `, out of ${count(data.rows.length)}` : "")
      : `None of ${count(data.rows.length)} answers fits this filter.`;
    place.textContent = `Page ${count(page + 1)} of ${count(last + 1)}`;
    before.disabled = page === 0;
    after.disabled = page === last;
    pages.hidden = last === 0;
    table.hidden = !found.length;
  };
  const filter = () => {
    const chosen = ["group", "wrapper", "outcome"].map((name) => form.elements[name].value);
    words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && !haystacks) {
      haystacks = new Map(data.rows.map((row) =>
        [row, [data.groups[row[0]], data.wrappers[row[1]], ...row.slice(3)].join("\n").toLowerCase()]));
    }
    found = data.rows.filter((row) =>
      chosen.every((value, field) => value === "" || row[field] === Number(value))
      && words.every((word) => haystacks.get(row).includes(word)));
    page = 0;
    draw();
  };
  const turn = (by) => {
    page += by;
    draw();
    table.scrollIntoView({ block: "start" });
  };

  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filter, WAIT);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    filter();
  });
  form.addEventListener("reset", () => setTimeout(filter));
  before.addEventListener("click", () => turn(-1));
  after.addEventListener("click", () => turn(1));
  form.hidden = false;
  filter();
})();
