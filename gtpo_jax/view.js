// The page of gtpo_jax/view.py. Every text of a run goes in by textContent: see `make`.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** An element; children are elements or text, and text is never read as markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text"].includes(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "share") element.style.setProperty("--share", value);
    else if (name === "onclick") element.addEventListener("click", value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(Boolean));
  return element;
}

const text = (number) => (number === null ? null : data.texts[number]);
const sign = (x) => (x > 0 ? "+" : x < 0 ? "−" : "");
const signed = (x) => (x === null ? "–" : sign(Number(x.toFixed(2))) + Math.abs(x).toFixed(2));

// ---- Python, coloured --------------------------------------------------------------------

const KEYWORDS = new Set(("False None True and as assert async await break case class continue " +
  "def del elif else except finally for from global if import in is lambda match nonlocal not " +
  "or pass raise return try while with yield").split(" "));
// c: comment; s: string, also one without its end; n: number; f: what is called; other names.
const PYTHON = new RegExp([
  "(?<c>#[^\\n]*)",
  "(?<s>(?:\\b[rbfuRBFU]{1,2})?(?:'''[\\s\\S]*?(?:'''|$)|\"\"\"[\\s\\S]*?(?:\"\"\"|$))" +
    "|(?:\\b[rbfuRBFU]{1,2})?(?:'(?:\\\\.|[^'\\\\\\n])*'?|\"(?:\\\\.|[^\"\\\\\\n])*\"?))",
  "(?<n>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*\\.?\\d*(?:[eE][+-]?\\d+)?j?)|\\.\\d+)",
  "(?<f>[^\\W\\d]\\w*(?=\\s*\\())|(?<name>[^\\W\\d]\\w*)",
].join("|"), "g");

/** Text nodes and spans whose texts together are `code`. */
function highlight(code) {
  const out = [];
  let end = 0;
  for (const match of code.matchAll(PYTHON)) {
    const named = Object.keys(match.groups).find((group) => match.groups[group] !== undefined);
    const kind = KEYWORDS.has(match[0]) ? "k" : named;
    if (kind === "name") continue;
    out.push(code.slice(end, match.index), make("span", { class: kind }, match[0]));
    end = match.index + match[0].length;
  }
  return [...out, code.slice(end)].filter((part) => part !== "");
}

// ---- trajectories ------------------------------------------------------------------------

const TOP_TURNS = 10;
const kindOf = (m) => (m.status === "tool_failure" ? "infra" : m.status === "truncated" ? "cut"
  : m.correct ? "right" : "wrong");
const VERDICTS = { right: "✓ right", wrong: "✗ wrong", cut: "… truncated", infra: "! infra" };
const verdict = (m) => (m.status === "void" ? "✗ no answer" : VERDICTS[kindOf(m)]);
const advantageOf = (turn) => turn[11];
const tone = (A, m) => (!A || !inLoss(m) ? "" : A > 0 ? "more" : "less");
const share = (A) => Math.min(1, Math.abs(A) / largest);
const inLoss = (m) => !data.left_out.includes(m.status);
const FILTERS = {
  all: ["all", () => true],
  right: ["right", (m) => kindOf(m) === "right"],
  wrong: ["wrong", (m) => kindOf(m) === "wrong"],
  infra: ["infra", (m) => kindOf(m) === "infra"],
  truncated: ["truncated", (m) => kindOf(m) === "cut"],
  highest: ["highest A", (m) => m.turns.some((t) => peaks.highest.has(t))],
  lowest: ["lowest A", (m) => m.turns.some((t) => peaks.lowest.has(t))],
};
const state = { step: 0, problem: 0, filter: "all" };
let peaks = { highest: new Set(), lowest: new Set() }, largest = 1;

const groups = () => data.steps[state.step].groups;
const passes = (m) => FILTERS[state.filter][1](m);
/** Numbers of the groups that the filter leaves something of; the most extreme ones first. */
function listed() {
  const numbers = groups().map((_, i) => i).filter((i) => groups()[i].members.some(passes));
  if (!(state.filter in peaks)) return numbers;
  const order = [...peaks[state.filter]];
  const rank = (i) => Math.min(...groups()[i].members.flatMap((m) => m.turns)
    .map((t) => order.indexOf(t)).filter((place) => place >= 0));
  return numbers.sort((a, b) => rank(a) - rank(b));
}

function goTo(change) {
  const old = state.step;
  Object.assign(state, change);
  if (state.step !== old || "step" in change) {
    const turns = groups().flatMap((g) => g.members.filter(inLoss)).flatMap((m) => m.turns)
      .filter((t) => advantageOf(t) !== null);
    turns.sort((a, b) => advantageOf(b) - advantageOf(a));
    peaks = {
      highest: new Set(turns.filter((t) => advantageOf(t) > 0).slice(0, TOP_TURNS)),
      lowest: new Set(turns.filter((t) => advantageOf(t) < 0).slice(-TOP_TURNS).reverse()),
    };
    largest = Math.max(1e-6, ...turns.map((t) => Math.abs(advantageOf(t))));
  }
  const numbers = listed();
  if (!numbers.includes(state.problem)) state.problem = numbers.length ? numbers[0] : 0;
  showBar();
  showProblems(numbers);
  $("nothing").hidden = numbers.length > 0;
  $("nothing").textContent =
    `Step ${data.steps[state.step].step} has nothing that is ${FILTERS[state.filter][0]}.`;
  $("problem").hidden = $("group").hidden = !numbers.length;
  if (numbers.length) showGroup(groups()[state.problem]);
}

function goNear(step) {
  if (!data.steps.length) return;
  const away = data.steps.map((s) => Math.abs(s.step - step));
  goTo({ step: away.indexOf(Math.min(...away)) });
}

function showBar() {
  const { step } = data.steps[state.step];
  $("slider").value = state.step;
  $("step").replaceChildren(make("b", {}, `step ${step}`),
    make("small", {}, `${state.step + 1} of ${data.steps.length} recorded`));
  $("before").disabled = state.step === 0;
  $("after").disabled = state.step === data.steps.length - 1;
  $("low").textContent = signed(-largest);
  $("high").textContent = signed(largest);
  markers.forEach((move) => move(step));
  const members = groups().flatMap((g) => g.members);
  for (const button of $("filters").children) {
    const name = button.dataset.filter, count = members.filter(FILTERS[name][1]).length;
    button.setAttribute("aria-pressed", name === state.filter);
    button.disabled = !count && name !== state.filter;
    button.querySelector("small").textContent = count;
  }
}

function showProblems(numbers) {
  const focused = $("problems").contains(document.activeElement);
  $("problems").replaceChildren(...numbers.map((i) => {
    const { problem, members } = groups()[i];
    const [id, , before, question] = data.problems[problem];
    const marks = members.map((m) => make("i",
      { class: kindOf(m) + (passes(m) ? "" : " faint"), title: `${m.member}: ${verdict(m)}` }));
    return make("button",
      { title: id, "aria-current": i === state.problem, onclick: () => goTo({ problem: i }) },
      make("span", {}, text(question) || text(before)),
      make("div", { class: "marks" }, ...marks));
  }));
  const current = $("problems").querySelector("[aria-current=true]");
  if (!current) return;
  // Within the list alone: scrollIntoView would move the page under the reader.
  const list = $("problems"), at = current.offsetTop - list.offsetTop;
  if (at < list.scrollTop) list.scrollTop = at;
  const end = at + current.offsetHeight - list.clientHeight;
  if (end > list.scrollTop) list.scrollTop = end;
  if (focused) current.focus({ preventScroll: true });
}

function showGroup(group) {
  const [id, answer, before, question, after] = data.problems[group.problem];
  $("title").textContent = id;
  $("prompt").replaceChildren(
    text(before), make("b", {}, text(question) || ""), text(after) || "");
  $("answer").replaceChildren("right answer ", make("b", {}, text(answer)));
  $("problem").classList.toggle("many", group.members.length > 8);
  showMap(group);
  showMatrix(group);
  const shown = group.members.filter(passes);
  const lines = shown.flatMap((m) => m.turns).flatMap((t) => (text(t[1]) || "").split("\n"));
  // Wide enough for the longest line of code, within limits that the style sets.
  $("group").style.setProperty("--characters", Math.max(...lines.map((line) => line.length)));
  const rows = 1 + Math.max(1, ...shown.map((m) => m.turns.length));
  $("group").replaceChildren(...shown.map((m) => {
    const column = make("article", { class: inLoss(m) ? "" : "out", "data-member": m.member },
      head(m), ...m.turns.map((t, i) => turn(t, i, m)));
    column.style.setProperty("--rows", rows);
    return column;
  }));
}

function head(m) {
  const sum = m.turns.reduce((total, t) => total + t[9], 0);
  const tokens = m.turns.reduce((total, t) => total + t[8], 0);
  const answer = m.answer === null ? ["no answer"] : ["answer ", make("b", {}, text(m.answer))];
  return make("div", { class: `head ${kindOf(m)}` },
    make("div", {}, make("b", { class: "verdict" }, verdict(m)),
      make("span", { class: "dim" }, `#${m.member}`)),
    make("p", { class: "said" }, ...answer,
      make("span", { class: "dim" }, text(m.reason) && ` ${text(m.reason)}`)),
    make("p", { class: "dim" }, `reward ${signed(sum)}, ${tokens} tokens sampled`,
      inLoss(m) ? null : "; not in the loss"));
}

const TONES = { ok: "right", "no call": "", infra: "infra", invalid: "wrong", error: "wrong" };

/** One turn; the list is taken apart as gtpo_jax.view.encode puts it together. */
function turn(fields, number, m) {
  const [before, code, after, kind, detail, seconds, feedback, output, tokens] = fields;
  const [r, R, A] = fields.slice(9);
  const peak = state.filter in peaks && peaks[state.filter].has(fields) ? "peak" : "";
  const value = (name, x, extra = "") =>
    make("span", {}, name, make("b", { class: extra }, signed(x)));
  return make("div", { class: `turn ${tone(A, m)} ${peak}`, share: share(A) },
    make("div", { class: "policy" },
      make("div", { class: "top" },
        make("span", { class: "dim" }, `turn ${number + 1}, ${tokens} tokens`),
        make("span", { class: `badge ${TONES[kind] ?? "cut"}` }, kind + took(seconds))),
      make("div", { class: "numbers" },
        value("r", r), value("R", R), value("A", A, "advantage")),
      ...sampled(text(before), text(code), text(after)),
      detail && make("p", { class: "dim" }, detail)),
    said(text(feedback), text(output)));
}

/** What the policy wrote, its code coloured; `after` null: it is there in another spelling. */
function sampled(before, code, after) {
  if (code === null) return [make("pre", {}, before)];
  const block = make("pre", { class: "code" }, ...highlight(code));
  if (after === null) return [make("pre", {}, before), block];
  const fence = before.trimEnd().lastIndexOf("\n") + 1; // the line that opens the block
  return [
    make("pre", {}, before.slice(0, fence),
      make("span", { class: "fence" }, before.slice(fence).trimEnd())),
    block,
    make("pre", { class: "fence" }, after.replace(/^\n/, "")),
  ];
}

/** What the tool answered: as the policy read it, and whole where that was cut. */
function said(feedback, output) {
  if (!feedback && output === null) return null;
  const whole = output !== null && make("details", {},
    make("summary", {}, "all the tool said"), make("pre", {}, output));
  return make("div", { class: "feedback masked" },
    make("pre", {}, (feedback || "").replace(/^\n+|\n+$/g, "")), whole);
}

function took(seconds) {
  if (seconds === null) return "";
  return seconds < 1 ? ` ${Math.ceil(seconds * 1000)} ms` : ` ${seconds.toFixed(1)} s`;
}

const memberName = (m) => make("th", { class: kindOf(m), title: verdict(m) },
  `${m.correct ? "✓" : ""}${m.member}`);

/** A row a trajectory, a column a turn; a click brings the trajectory into sight. */
function showMap({ members }) {
  const turns = [...Array(Math.max(...members.map((m) => m.turns.length))).keys()];
  const cell = (m, t) => make("td",
    { class: tone(t[11], m), share: share(t[11]), onclick: () => showMember(m) },
    inLoss(m) ? signed(t[11]) : "–");
  const row = (m) => make("tr", {}, memberName(m),
    ...turns.map((i) => (i in m.turns ? cell(m, m.turns[i]) : make("td", { class: "none" }))));
  $("map").replaceChildren(
    make("tr", {}, make("th"), ...turns.map((i) => make("th", {}, `${i + 1}`))),
    ...members.map(row));
}

function showMember(m) {
  const column = $("group").querySelector(`[data-member="${Number(m.member)}"]`);
  if (column) column.scrollIntoView({ block: "nearest", inline: "start", behavior: "smooth" });
}

/** Hundredths of similarity; what shaping gives a wrong answer is the mean over right ones. */
function showMatrix({ members, similar }) {
  const right = [...members.keys()].filter((i) => members[i].correct && inLoss(members[i]));
  const mean = (i) => right.reduce((sum, j) => sum + similar[i][j], 0) / right.length / 100;
  const shaped = (m) => right.length > 0 && !m.correct && m.status === "finished";
  const rows = members.map((m, i) => make("tr", {}, memberName(m),
    ...similar[i].map((x) => make("td", { share: x / 100 },
      x === 100 ? "1" : x ? `.${String(x).padStart(2, "0")}` : "·")),
    shaped(m) && make("td", { class: "mean" }, mean(i).toFixed(2))));
  const some = members.some(shaped);
  const last = some && make("th", {}, "mean to ✓");
  $("matrix").replaceChildren(
    make("tr", {}, make("th"), ...members.map(memberName), last), ...rows);
  $("credit").hidden = !some || data.alpha === null;
  $("credit").textContent = data.alpha
    ? `A wrong answer earns α = ${data.alpha} times its mean similarity to the right ones.`
    : "In this run a wrong answer earns nothing by it (α = 0).";
}

// ---- the page ----------------------------------------------------------------------------

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.style.colorScheme
    ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
  $("theme").textContent = dark ? "Dark" : "Light";
}

/** `by` further in `items` than where `now` stands, as far as there are any. */
function further(items, now, by) {
  const place = items.indexOf(now) + by;
  return items[Math.min(items.length - 1, Math.max(0, place))];
}

function nextFilter(by) {
  const names = [...$("filters").children].filter((b) => !b.disabled).map((b) => b.dataset.filter);
  const place = names.indexOf(state.filter) + by + names.length;
  goTo({ filter: names[place % names.length] });
}

const moveStep = (by) => goTo({ step: further([...data.steps.keys()], state.step, by) });
function moveProblem(by) {
  const numbers = listed();
  if (numbers.length) goTo({ problem: further(numbers, state.problem, by) });
}
const KEYS = {
  ArrowLeft: () => moveStep(-1), ArrowRight: () => moveStep(1),
  ArrowUp: () => moveProblem(-1), ArrowDown: () => moveProblem(1),
  k: () => moveProblem(-1), j: () => moveProblem(1),
  f: () => nextFilter(1), F: () => nextFilter(-1),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.key === "?") $("help").showModal();
  else if (event.key === "t") toggleTheme();
  else if (event.key in KEYS && data.steps.length) KEYS[event.key]();
  else return;
  event.preventDefault(); // the slider and the page would move as well
}

function begin() {
  document.title = `${data.run}: report of a run`;
  $("run").textContent = data.run;
  $("facts").append(...data.facts.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  $("notes").append(...data.notes.map((note) => make("li", {}, note)));
  if (matchMedia("(prefers-color-scheme: dark)").matches) $("theme").textContent = "Light";
  $("theme").addEventListener("click", toggleTheme);
  $("keys").addEventListener("click", () => $("help").showModal());
  document.addEventListener("keydown", onKey);
  drawCurves();
  if (!data.steps.length) return;
  $("recorded").hidden = false;
  $("filters").append(...Object.entries(FILTERS).map(([name, [label]]) => make("button",
    { "data-filter": name, onclick: () => goTo({ filter: name }) }, label, make("small"))));
  $("slider").max = data.steps.length - 1;
  $("slider").addEventListener("input", () => goTo({ step: Number($("slider").value) }));
  $("before").addEventListener("click", () => moveStep(-1));
  $("after").addEventListener("click", () => moveStep(1));
  goTo({ step: 0 });
}
