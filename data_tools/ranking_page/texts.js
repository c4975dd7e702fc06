// The prompt and its answers on the page. Texts are only ever set as text, never as HTML.

const $ = (id) => document.getElementById(id);

function make(tag, classes, text) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(classes, text, action) {
  const element = make("button", classes, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

const ROLES = {
  system: "Instructions", user: "User", assistant: "Assistant", tools: "Tools", tool_calls: "Calls of tools",
  tool: "Reply of a tool",
};

// A browser takes minutes to lay out a line or a word of a million characters, so long texts become several blocks, which
// are laid out where they are in view, and long words may break here and there.
const LONGEST_BLOCK = 4000;
const LONGEST_WORD = 500;

/** A text in pieces that are not longer than `most`, and end with a line, else with a word, else anywhere but within a
 * character. */
function pieces(text, most) {
  const found = [];
  let from = 0;
  while (text.length - from > most) {
    const next = text.slice(from, from + most);
    const end = next.lastIndexOf("\n") + 1 || next.lastIndexOf(" ") + 1;
    const length = end || most - Number(/[\ud800-\udbff]$/.test(next));
    found.push(text.slice(from, from + length));
    from += length;
  }
  return [...found, text.slice(from)];
}

function block(text) {
  const part = make("div");
  part.dir = "auto";
  for (const word of pieces(text, LONGEST_WORD)) part.append(...(part.hasChildNodes() ? [make("wbr"), word] : [word]));
  return part;
}

/** A text in any script. A long one is cut; `finishTexts` gives it a button that shows all of it. */
function textBlock(text) {
  const clip = make("div", "clip");
  const inner = make("div", "text");
  inner.append(...pieces(text, LONGEST_BLOCK).map(block));
  clip.append(inner);
  return clip;
}

/** Give the texts that do not fit their buttons, once they are on the page. */
function finishTexts(parent) {
  for (const block of parent.querySelectorAll(".clip")) {
    if (block.scrollHeight <= block.clientHeight + 60) {
      block.classList.add("open");
      continue;
    }
    const more = button("more", "Show all", () => {
      const open = block.classList.toggle("open");
      more.textContent = open ? "Show less" : "Show all";
      more.setAttribute("aria-expanded", String(open));
    });
    more.setAttribute("aria-expanded", "false");
    block.after(more);
  }
}

function showTurns(turns) {
  const parts = turns.map((turn, index) => {
    const part = make("div", `turn ${turn.role === "assistant" ? "assistant" : ""}`);
    part.classList.toggle("last", index === turns.length - 1);
    part.append(make("h2", "role", ROLES[turn.role] ?? turn.role), textBlock(turn.text));
    return part;
  });
  $("turns").replaceChildren(...parts);
  finishTexts($("turns"));
}

/** The cards of the answers in the order shown. `chip(answer)` makes the button that places it. */
function showAnswers(texts, chip) {
  const cards = texts.map((text, answer) => {
    const card = make("article", "answer");
    card.setAttribute("role", "listitem");
    card.dataset.card = answer;
    const head = make("div", "line head");
    head.append(chip(answer), make("span", "state soft"));
    card.append(head, textBlock(text));
    return card;
  });
  $("answers").replaceChildren(...cards);
  finishTexts($("answers"));
}

/** Write each answer's place on its card. */
function labelAnswers(ranking) {
  for (const card of document.querySelectorAll("[data-card]")) {
    const answer = Number(card.dataset.card);
    const place = ranking.describe(answer);
    const at = ranking.tierOf(answer);
    card.classList.toggle("placed", at >= 0);
    card.querySelector(".state").textContent = place;
    card.querySelector(".chip").setAttribute("aria-label", `Answer ${answer + 1}, ${place}`);
  }
}

function minutes(seconds) {
  if (seconds >= 5400) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.max(1, Math.round(seconds / 60))} min`;
}

/** Say something to a screen reader. */
function say(text) {
  $("live").textContent = "";
  requestAnimationFrame(() => ($("live").textContent = text));
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}
