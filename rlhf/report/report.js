"use strict";
// Values at the pointer in charts and tokens, by mouse, touch and keyboard. Without scripts the page is complete
// but for these. Texts are set by textContent alone, so nothing that a run wrote becomes markup.

function element(kind, name, parent) {
  const made = document.createElement(kind);
  made.className = name;
  parent.appendChild(made);
  return made;
}

function chart(canvas) {
  const data = JSON.parse(canvas.dataset.points);
  const [left, top, right, bottom] = data.box;
  const cursor = element("div", "cursor", canvas), tip = element("div", "tip", canvas);
  const marks = data.lines.map((line) => {
    const mark = element("div", "mark", canvas);
    mark.style.background = line.colour;
    return mark;
  });
  const said = element("div", "said", canvas);
  said.setAttribute("aria-live", "polite");
  const steps = data.across === "step";
  const stops = [...new Set(data.lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
  let stop = -1;

  function hide() {
    for (const one of [cursor, tip, ...marks]) one.style.display = "none";
  }

  function nearest(values, wanted) {
    let best = 0;
    for (let i = 1; i < values.length; i++)
      if (Math.abs(values[i] - wanted) < Math.abs(values[best] - wanted)) best = i;
    return best;
  }

  function show(fraction, speak) {
    const all = data.lines.flatMap((line, number) => line.at.map((at, i) => ({ number, i, x: at[0] })));
    const here = all[nearest(all.map((one) => one.x), fraction)];
    const wide = canvas.clientWidth, high = canvas.clientHeight;
    cursor.style.cssText = `display:block;left:${here.x * wide}px;top:${top * high}px;height:${(bottom - top) * high}px`;
    tip.textContent = "";
    const heading = data.lines[here.number].xs[here.i];
    element("b", "", tip).textContent = steps ? `step ${heading.toLocaleString("en")}` : `${data.across}: ${heading}`;
    const words = [tip.textContent];
    data.lines.forEach((line, number) => {
      const i = nearest(line.at.map((at) => at[0]), here.x);
      const near = Math.abs(line.at[i][0] - here.x) < (steps ? 0.03 : 0.005);
      marks[number].style.display = near ? "block" : "none";
      if (!near) return;
      marks[number].style.left = `${line.at[i][0] * wide}px`;
      marks[number].style.top = `${line.at[i][1] * high}px`;
      const row = element("div", "", tip);
      element("i", "", row).style.background = line.colour;
      const other = steps && line.xs[i] !== heading ? ` (step ${line.xs[i].toLocaleString("en")})` : "";
      row.appendChild(document.createTextNode(`${line.name}${other}: ${line.says[i]}`));
      words.push(`${line.name}${other} ${line.says[i]}`);
    });
    tip.style.display = "block";
    const x = here.x * wide, width = tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(wide - width, x + (x > wide / 2 ? -width - 10 : 10)))}px`;
    tip.style.top = `${top * high}px`;
    if (speak) said.textContent = words.join(", ");
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    show((event.clientX - box.left) / box.width, false);
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: stop < 0 ? -1 : stop - 1, ArrowRight: stop + 1, Home: 0, End: stops.length - 1 };
    if (event.key === "Escape") return hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    stop = Math.max(0, Math.min(stops.length - 1, moves[event.key] < 0 ? stops.length - 1 : moves[event.key]));
    for (const line of data.lines) {
      const i = line.xs.indexOf(stops[stop]);
      if (i >= 0) return show(line.at[i][0], true);
    }
  });
}

const tip = element("div", "tip", document.body);

function answer(box) {
  const tokens = [...box.querySelectorAll(".token")], said = element("div", "said", box);
  said.setAttribute("aria-live", "polite");
  let here = -1;

  function leave() {
    tip.style.display = "none";
    tokens.forEach((token) => token.classList.remove("here"));
  }

  function show(index, speak) {
    leave();
    here = index;
    const token = tokens[index], says = JSON.parse(token.dataset.says), text = token.textContent.trim();
    token.classList.add("here");
    tip.textContent = "";
    element("b", "", tip).textContent = text || "space";
    for (const [name, value] of Object.entries(says)) element("div", "", tip).textContent = `${name}: ${value}`;
    tip.style.display = "block";
    const place = token.getBoundingClientRect(), width = tip.offsetWidth;
    tip.style.left = `${scrollX + Math.max(4, Math.min(document.documentElement.clientWidth - width - 4, place.left))}px`;
    tip.style.top = `${scrollY + place.bottom + 6}px`;
    if (speak) {
      token.scrollIntoView({ block: "nearest" });
      said.textContent = `${text}: ${Object.entries(says).map(([name, value]) => `${name} ${value}`).join(", ")}`;
    }
  }

  tokens.forEach((token, index) => {
    token.addEventListener("pointerenter", () => show(index, false));
    token.addEventListener("pointerleave", leave);
  });
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: tokens.length - 1 };
    if (event.key === "Escape") return leave();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(Math.max(0, Math.min(tokens.length - 1, moves[event.key])), true);
  });
}

function paint(section, measure) {
  for (const token of section.querySelectorAll(".token")) {
    const heat = JSON.parse(token.dataset.heat)[measure] ?? 0;
    token.style.setProperty("--heat", heat < 0 ? "#d64545" : "#3d85c6");
    token.style.setProperty("--much", Math.abs(heat));
  }
  for (const button of section.querySelectorAll(".picker button"))
    button.setAttribute("aria-pressed", String(button.dataset.measure === measure));
}

function start(page) {
  page.querySelectorAll(".canvas").forEach(chart);
  page.querySelectorAll(".answer[tabindex]").forEach(answer);
  for (const picker of page.querySelectorAll(".picker")) {
    const section = picker.closest("section"), buttons = [...picker.querySelectorAll("button")];
    for (const button of buttons) button.addEventListener("click", () => paint(section, button.dataset.measure));
    const first = buttons.find((button) => button.dataset.measure === picker.dataset.first) ?? buttons[0];
    if (first) paint(section, first.dataset.measure);
  }
}

// A page that is served while a run goes on asks for itself again; what was open or chosen stays so.
function follow(seconds) {
  const state = document.querySelector(".live");
  let last = "";
  async function look() {
    try {
      const reply = await fetch(location.href);
      if (!reply.ok) throw new Error(String(reply.status));
      const text = await reply.text();
      state.textContent = "live";
      if (text === last) return;
      last = text;
      const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
      const open = [...document.querySelectorAll("main details")].map((one) => one.open);
      const chosen = [...document.querySelectorAll("main .picker [aria-pressed=true]")].map((one) => one.dataset.measure);
      [...fresh.querySelectorAll("details")].forEach((one, i) => (one.open = open[i] ?? one.open));
      document.querySelector("main").replaceWith(fresh);
      tip.style.display = "none";
      start(fresh);
      [...fresh.querySelectorAll(".picker")].forEach((picker, i) => {
        if (chosen[i]) paint(picker.closest("section"), chosen[i]);
      });
    } catch {
      state.textContent = "rlhf report --watch has ended; this is its last page";
    }
  }
  setInterval(look, 1000 * seconds);
}

start(document);
if (document.body.dataset.refresh) follow(Number(document.body.dataset.refresh));
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
