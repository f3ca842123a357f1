// The curves of the page; in one script with view.js, which comes first.
const markers = []; // functions that move a curve's line to the recorded step that is shown
// title: [[phase, key, label], ...]; what a run does not have is left out. The first FRONT that
// it has stand at the top, the others below a fold, with a card for each key not named here.
const FRONT = 6;
const PANELS = {
  "Accuracy": [["train", "accuracy/train", "train"], ["eval", "eval/accuracy", "held out"]],
  "Reward": [["train", "reward/mean", "mean"]],
  "Turns": [["train", "rollout/turns_mean", "turns"], ["train", "tool/calls_mean", "calls"]],
  "Tool errors": [["train", "tool/error_rate", "failed"],
    ["train", "tool/invalid_rate", "invalid"], ["train", "tool/timeout_rate", "timeout"]],
  "Without an answer": [["train", "rollout/truncated", "truncated"],
    ["train", "rollout/void", "void"], ["train", "rollout/tool_failure", "infra"]],
  "Tokens/s": [["train", "rollout/tokens_per_s", "sampled"],
    ["train", "update/tokens_per_s", "trained"]],
  "Tokens": [["train", "rollout/tokens_mean", "a trajectory"]],
  "Advantage": [["train", "advantage/std", "std"], ["train", "advantage/zero_share", "share of 0"]],
  "Entropy": [["train", "train/entropy", "entropy"]],
  "Gradient": [["train", "train/grad_norm", "norm"]],
  "Seconds": [["train", "time/rollout", "sample"], ["train", "time/tools", "tools"],
    ["train", "time/update", "update"]],
  "Loss": [["train", "train/loss", "loss"], ["sft", "sft/loss", "cold start"],
    ["sft", "sft/held_out_loss", "held out"]],
  "Numbers right": [["sft", "sft/number_accuracy", "cold start"]],
};
const WIDTH = 210, HEIGHT = 96, LEFT = 40, BOTTOM = 16, TOP = 8;

/** Points [step, value] of a key, without the gaps. */
function points(phase, key) {
  const lines = data.curves[phase];
  if (!lines || !lines[key]) return [];
  return lines.step.map((step, i) => [step, lines[key][i]]).filter(([, v]) => v !== null);
}

function smooth(series) {
  const half = 3;
  return series.map(([step], i) => {
    const part = series.slice(Math.max(0, i - half), i + half + 1);
    return [step, part.reduce((sum, [, v]) => sum + v, 0) / part.length];
  });
}

function short(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1);
  if (size >= 100) return String(Math.round(x));
  return String(Number(x.toPrecision(3)));
}

/** A card with the curves of `keys`, or null where the run has none of them. */
function curve(title, keys) {
  const series = keys
    .map(([phase, key, label]) => ({ phase, key, label, at: points(phase, key) }))
    .filter((s) => s.at.length);
  if (!series.length) return null;
  const all = series.flatMap((s) => s.at);
  const steps = all.map(([step]) => step), values = all.map(([, value]) => value);
  if (keys.some(([, key]) => key === "eval/accuracy")) {
    values.push(...points("eval", "eval/high").map(([, high]) => high));
  }
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Math.min(...values, 0), Math.max(...values)];
  if (low === high) high = low + 1;
  const x = (step) => LEFT + (WIDTH - LEFT - 6) * (step - first) / (last - first || 1);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low);
  const path = (at) => "M" + at.map(([s, v]) => `${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join("L");

  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const value of [low, high]) {
    svg.append(
      make("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }),
      make("text", { x: LEFT - 5, y: y(value) + 3.5, "text-anchor": "end" }, short(value)),
    );
  }
  svg.append(make("text", { x: LEFT, y: HEIGHT - 3 }, `step ${first}`),
    make("text", { x: WIDTH - 4, y: HEIGHT - 3, "text-anchor": "end" }, String(last)));
  const upright = { y1: TOP - 4, y2: HEIGHT - BOTTOM, visibility: "hidden" };
  const here = make("line", { class: "here", ...upright });
  const hover = make("line", { class: "hover", ...upright });
  svg.append(here, hover);
  series.forEach((s, i) => {
    if (s.at.length > 20) {
      svg.append(make("path", { class: `raw c${i}`, d: path(s.at) }),
        make("path", { class: `smooth c${i}`, d: path(smooth(s.at)) }));
      return;
    }
    if (s.key === "eval/accuracy") {
      const lows = new Map(points(s.phase, "eval/low"));
      const highs = new Map(points(s.phase, "eval/high"));
      const bars = s.at.filter(([step]) => lows.has(step) && highs.has(step))
        .map(([step]) => `M${x(step)} ${y(lows.get(step))}V${y(highs.get(step))}`).join("");
      if (bars) svg.append(make("path", { class: `whisker c${i}`, d: bars }));
    }
    svg.append(make("path", { class: `smooth c${i}`, d: path(s.at) }),
      ...s.at.map(([step, v]) => make("circle", { class: `c${i}`, cx: x(step), cy: y(v), r: 2.6 })));
  });

  const shown = series.map((s, i) =>
    make("span", {}, make("i", { class: `c${i}` }), s.label, make("b")));
  const step = make("span");
  const tell = (at) => {
    step.textContent = at === null ? "" : `step ${at}`;
    series.forEach((s, i) => {
      const near = at === null ? s.at[s.at.length - 1]
        : s.at.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      shown[i].querySelector("b").textContent = short(near[1]);
    });
  };
  tell(null);
  const under = (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - 6);
    const wanted = first + Math.min(1, Math.max(0, share)) * (last - first);
    return steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
  };
  const point = (at) => { tell(at); place(hover, at); };
  svg.addEventListener("pointermove", (event) => point(under(event)));
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("click", (event) => goNear(under(event)));
  const place = (line, at) => {
    const inside = at !== null && at >= first && at <= last;
    line.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { line.setAttribute("x1", x(at)); line.setAttribute("x2", x(at)); }
  };
  markers.push((at) => place(here, at));
  return make("div", { class: "curve" }, make("h3", {}, title), make("p", {}, ...shown, step), svg);
}
function drawCurves() {
  const used = new Set(["step", "eval/low", "eval/high"]);
  const rest = $("more").querySelector("div");
  for (const [title, keys] of Object.entries(PANELS)) {
    const card = curve(title, keys);
    keys.forEach(([, key]) => used.add(key));
    if (card) ($("curves").children.length < FRONT ? $("curves") : rest).append(card);
  }
  for (const [phase, lines] of Object.entries(data.curves)) {
    for (const key of Object.keys(lines).filter((k) => !used.has(k))) {
      const card = curve(key, [[phase, key, phase]]);
      if (card) rest.append(card);
    }
  }
  $("more").hidden = !rest.children.length;
}
