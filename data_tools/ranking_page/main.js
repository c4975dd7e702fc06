// The flow: a name, one prompt after the other, the end.

const { settings, items } = JSON.parse($("data").textContent);
const drawer = new Drawer(`rlhf-rank ${settings.fingerprint} ${settings.mode}`);
const store = items ? new FileStore(items, settings, drawer) : new ServerStore();
const board = new Board(changed, () => now && draw());
const choosing = settings.mode === "best-worst";
let now = null; // the prompt on the screen: {item, version, vote, order, ranking, seconds, vote name}
let history = []; // ids of the prompts that were decided, in order
let progress = null;
let busy = false;
let unsaved = false; // votes that are only in this page and not in a saved file

// ---- time in view

let since = null;

function tick() {
  const seen = performance.now();
  if (now && since !== null) now.seconds += (seen - since) / 1000;
  since = document.hidden ? null : seen;
}

document.addEventListener("visibilitychange", tick);

// ---- screens

function screen(name) {
  for (const one of ["join", "work", "end"]) $(one).hidden = one !== name;
  $("top").hidden = name === "join";
  $("saved").hidden = !items;
  scrollTo(0, 0);
}

function showProgress(found) {
  progress = found;
  const done = found.ranked + found.cannot_tell;
  const total = done + found.left;
  $("bar").max = Math.max(1, total);
  $("bar").value = done;
  const here = now?.vote && now.vote.verdict !== "skipped" ? history.indexOf(now.item.id) + 1 : done + 1;
  const left = found.seconds === null || !found.left ? "" : ` · about ${minutes(found.seconds * found.left)} left`;
  $("where").textContent = now ? `${here} of ${total}${left}` : `${done} of ${total}`;
  $("who").textContent = store.annotator;
  $("who").setAttribute("aria-label", `${store.annotator}: change the name`);
}

/** Show a prompt, with the vote that is there already, or the draft of an earlier visit. */
function load(task) {
  notice("");
  since = document.hidden ? null : performance.now();
  const order = shuffled(task.item.answers.length, `${settings.seed} ${task.item.id} ${store.annotator}`);
  const ranking = new Ranking(order.length, settings.mode);
  const draft = drawer.get(`draft ${store.annotator} ${task.item.id}`);
  const saved = task.vote?.verdict === "ranked" && task.vote.mode === settings.mode ? task.vote : null;
  const shown = saved?.tiers.map((tier) => tier.map((answer) => order.indexOf(answer)));
  ranking.restore(draft?.tiers ?? shown ?? ranking.tiers);
  now = { ...task, order, ranking, seconds: draft?.seconds ?? task.vote?.seconds ?? 0, name: random() };
  $("comment").value = draft?.comment ?? task.vote?.comment ?? "";
  showComment(Boolean($("comment").value));
  screen("work");
  showTurns(task.item.turns);
  const texts = order.map((answer) => task.item.answers[answer]);
  board.ranking = ranking;
  showAnswers(texts, (answer) => board.chip(answer));
  board.show(ranking, texts);
  showProgress(task.progress ?? progress);
  $("title").textContent = `Prompt ${$("where").textContent.split(" · ")[0]}`;
  const decided = Boolean(task.vote) && task.vote.verdict !== "skipped";
  $("skip").textContent = decided ? "Leave as it is" : "Skip";
  if (task.vote?.verdict === "cannot-tell") notice("You said that you cannot tell. You may still rank the answers.");
  draw();
  $("title").focus({ preventScroll: true });
}

function draw() {
  const { ranking } = now;
  $("undo").disabled = busy || !(ranking.past.length || previous());
  $("redo").disabled = busy || !ranking.future.length;
  $("back").disabled = busy || !previous();
  $("tie").hidden = choosing;
  $("tie").disabled = busy || !ranking.tiers.length || !ranking.pool.length;
  $("tie").setAttribute("aria-pressed", String(ranking.tieNext));
  $("save").disabled = busy || !ranking.complete;
  for (const id of ["tell", "skip"]) $(id).disabled = busy;
  const rest = ranking.pool.length;
  $("hint").textContent = choosing
    ? ranking.complete ? "" : "Choose the best and the worst answer."
    : rest ? `${rest} of ${ranking.count} not ranked yet` : "";
}

function changed(answer) {
  board.draw();
  draw();
  keepDraft();
  if (answer !== undefined) say(`Answer ${answer + 1}: ${now.ranking.describe(answer)}`);
}

function keepDraft() {
  tick();
  const draft = { tiers: now.ranking.tiers, comment: $("comment").value, seconds: now.seconds };
  try {
    drawer.set(`draft ${store.annotator} ${now.item.id}`, draft);
  } catch {
    // a full storage: the draft is not kept, and saving the vote says so
  }
}

function showComment(open) {
  $("comment").hidden = !open;
  $("note").setAttribute("aria-expanded", String(open));
}

// ---- going on

/** Show what a store's reply says is next. */
function advance(found) {
  now = null;
  if (found.task && !(found.skipped && !advance.skipped)) {
    advance.skipped = found.skipped;
    load(found.task);
    return;
  }
  screen("end");
  showProgress(found.progress);
  const { ranked, cannot_tell: unclear, skipped, left } = found.progress;
  const held = left > 0 && !found.task;
  $("endtitle").textContent = held
    ? "Others have the rest on their screens"
    : found.task ? "Only skipped prompts are left" : "All done. Thank you!";
  const counts = `${ranked} ranked${unclear ? `, ${unclear} that you cannot tell` : ""}.`;
  const send = "Save the result, and send the file back to the person who sent you this page.";
  $("endtext").textContent = items ? `${counts} ${send}` : `${counts} Everything is saved; you may close this page.`;
  $("endsave").hidden = !items;
  $("endskipped").hidden = !found.task;
  $("endskipped").textContent = `Go through the ${skipped} skipped`;
  $("endheld").hidden = !held;
  $("endcheck").hidden = Boolean(items || found.task);
  $("back").disabled = !previous();
  $("endtitle").focus({ preventScroll: true });
}

async function lookAgain(heldToo = false) {
  const found = await attempt(() => store.next(heldToo));
  if (found) advance(found);
}

/** The prompt that was decided before the one on the screen. */
function previous() {
  const at = now ? history.indexOf(now.item.id) : -1;
  return at < 0 ? history[history.length - 1] : history[at - 1];
}

async function back() {
  const item = previous();
  if (!item || busy) return;
  const task = await attempt(() => store.open(item));
  if (task) load(task);
}

/** Do something with the store, again until the server answers. Undefined after an error that stays. */
async function attempt(action) {
  busy = true;
  if (now) draw();
  try {
    for (;;) {
      try {
        const found = await action();
        notice("");
        return found;
      } catch (error) {
        if (error instanceof Conflict) throw error;
        notice(error.fatal ? error.message : `${error.message} Trying again; please leave this page open.`);
        if (error.fatal) return undefined;
        await new Promise((resolve) => setTimeout(resolve, 1500));
      }
    }
  } finally {
    busy = false;
    if (now) draw();
  }
}

async function vote(verdict) {
  if (busy || !now || (verdict === "ranked" && !now.ranking.complete)) return;
  keepDraft();
  const { item, order, ranking, version, name } = now;
  const tiers = verdict === "ranked" ? ranking.result().map((tier) => tier.map((answer) => order[answer])) : [];
  const seconds = Math.min(now.seconds, 86400);
  const row = { item: item.id, verdict, mode: settings.mode, order, tiers, seconds, comment: $("comment").value.trim() };
  const mine = ranking.tiers;
  try {
    const found = await attempt(() => store.save({ ...row, vote: name }, version));
    if (!found) return;
    drawer.remove(`draft ${store.annotator} ${item.id}`);
    history = history.filter((other) => other !== item.id);
    if (verdict !== "skipped") history.push(item.id);
    unsaved = true;
    advance(found);
    say(verdict === "skipped" ? `Skipped. ${$("title").textContent}` : `Saved. ${$("title").textContent}`);
  } catch (error) {
    if (!(error instanceof Conflict)) throw error;
    drawer.remove(`draft ${store.annotator} ${item.id}`);
    load(error.task);
    now.ranking.past = [mine];
    draw();
    notice("This prompt was changed in another tab. This is what was saved there; Undo brings back your version.");
  }
}

async function skip() {
  if (now?.vote && now.vote.verdict !== "skipped") {
    drawer.remove(`draft ${store.annotator} ${now.item.id}`);
    await lookAgain();
  } else {
    await vote("skipped");
  }
}

function undo() {
  if (busy || !now) return;
  if (now.ranking.undo()) changed();
  else back();
}

function redo() {
  if (!busy && now?.ranking.redo()) changed();
}

function tie(on = !now.ranking.tieNext) {
  now.ranking.tieNext = on && !choosing && now.ranking.tiers.length > 0;
  draw();
  if (now.ranking.tieNext) say("The next answer ties with the last one.");
}

// ---- the file of a page without a server

function saveResult() {
  const text = JSON.stringify(store.result(), null, 1);
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `rankings-${store.annotator.replace(/[^\p{L}\p{N}_.-]+/gu, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
  say("The result is saved as a file.");
}

async function restoreResult(file) {
  try {
    const count = store.restore(JSON.parse(await file.text()));
    $("name").value = store.annotator;
    notice(`${count} votes of ${store.annotator} are taken over. Press Start to go on.`);
  } catch (error) {
    notice(error.fatal ? error.message : "This file is not a result of this page.");
  }
}

addEventListener("beforeunload", (event) => {
  if (now) keepDraft();
  if (items && !drawer.lasting && unsaved) event.preventDefault();
});

// ---- keys

const LETTERS = {
  u: undo, r: redo, "=": () => tie(true), ">": () => tie(false), c: () => vote("cannot-tell"), s: skip, b: back,
  m: openComment, "?": () => $("keys").showModal(), Enter: () => vote("ranked"),
};
const HELP = [
  choosing
    ? ["1 2 3 …", "the best answer, then the worst; the same key takes it back"]
    : ["1 2 3 …", "that answer gets the next place, best first; the same key takes it back"],
  ...(choosing ? [] : [["=", "the next answer ties with the last one"]]),
  ["Enter", "save, and go to the next prompt"],
  ["C", "cannot tell: the prompt counts as done, without a ranking"],
  ["S", "skip: the prompt comes again at the end"],
  ["U, R", "undo, redo; after the first step, undo goes back to the prompt before"],
  ["B", "back to the prompt before"],
  ["M", "comment; Escape leaves it"],
  ["↑ ↓", "on an answer that was reached by Tab: half a place up or down"],
];

function openComment() {
  showComment(true);
  $("comment").focus();
}

document.addEventListener("keydown", (event) => {
  if (!now || $("keys").open || event.altKey || event.isComposing) return;
  const typing = event.target.closest("textarea, input");
  if (event.ctrlKey || event.metaKey) {
    const name = event.key.toLowerCase();
    if (typing && name !== "enter") return;
    const action = { z: event.shiftKey ? redo : undo, y: redo, enter: () => vote("ranked") }[name];
    if (action) event.preventDefault();
    action?.();
    return;
  }
  if (typing) {
    if (event.key === "Escape") $("title").focus({ preventScroll: true });
    return;
  }
  if (event.key === "Escape") board.release();
  const placed = event.target.closest(".chip") && now.ranking.complete; // Enter saves then, and Space takes it back
  if (event.repeat || (event.key === "Enter" && event.target.closest("button") && !placed)) return;
  const digit = /^[0-9]$/.test(event.key) ? (Number(event.key) + 9) % 10 : -1;
  if (digit >= 0 && digit < now.ranking.count && !busy) {
    if (now.ranking.toggle(digit)) changed(digit);
    return;
  }
  const action = LETTERS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) event.preventDefault();
  action?.();
});

// ---- start

function start() {
  $("aim").textContent = choosing
    ? `There are ${settings.total} prompts. For each, choose the best and the worst answer.`
    : `There are ${settings.total} prompts. For each, put the answers in order, best first. Equally good ones may tie.`;
  $("name").maxLength = settings.longestName;
  $("comment").maxLength = settings.longestComment;
  $("name").value = drawer.get("annotator") ?? settings.annotator;
  $("restore").hidden = !items;
  $("keystext").replaceChildren(...HELP.map(([key, text]) => {
    const line = make("p", "key");
    line.append(make("kbd", "", key), make("span", "", text));
    return line;
  }));
  if (items && !drawer.lasting) notice("This browser keeps nothing here. Save the result before you close the page.");
  screen("join");
  $("name").focus();
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy) return;
  const fault = nameFault($("name").value, settings.longestName);
  if (fault) return notice(fault);
  const found = await attempt(() => store.join($("name").value));
  if (!found) return;
  history = found.history;
  drawer.set("annotator", store.annotator);
  advance.skipped = false;
  advance(found);
  if (found.shared) notice("This name is in use in another tab, too. If that is not you, choose another name.");
  else if (found.namesake) {
    notice(`"${store.annotator}" is a new name. If you are "${found.namesake}", press the name above and enter that one.`);
  }
});

const CLICKS = {
  back, undo, redo, skip, saved: saveResult, endsave: saveResult, help: () => $("keys").showModal(),
  tie: () => tie(), save: () => vote("ranked"), tell: () => vote("cannot-tell"),
  note: () => ($("comment").hidden ? openComment() : showComment(false)),
  who: () => {
    if (now) keepDraft();
    now = null;
    start();
  },
  endcheck: () => lookAgain(),
  endheld: () => lookAgain(true),
  endskipped: () => {
    advance.skipped = true;
    return lookAgain();
  },
};
for (const [id, action] of Object.entries(CLICKS)) $(id).addEventListener("click", () => action());
$("work").addEventListener("mousedown", (event) => {
  if (!event.target.closest("button")) return;
  event.preventDefault(); // a click leaves the focus where it is, or Enter would press the button again and not save
  if (document.activeElement === $("comment")) $("title").focus({ preventScroll: true });
});
$("comment").addEventListener("input", keepDraft);
$("file").addEventListener("change", () => $("file").files[0] && restoreResult($("file").files[0]));
start();
