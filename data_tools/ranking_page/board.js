// The board: places as boxes, answers as chips that are dragged, tapped, or moved by arrow keys.

const DRAG_FROM = 6; // pixels that a pointer moves before a press becomes a drag
const REACH = 90; // pixels from the board within which a drop still counts

class Board {
  /** `changed(answer)` is called after the ranking has changed by that answer, `settled()` at the end of a drag. */
  constructor(changed, settled) {
    Object.assign(this, { changed, settled });
    this.ranking = null;
    this.texts = [];
    this.held = null;
    addEventListener("pointermove", (event) => this.move(event));
    addEventListener("pointerup", (event) => this.drop(event));
    addEventListener("pointercancel", () => this.release());
  }

  show(ranking, texts) {
    this.release();
    Object.assign(this, { ranking, texts });
    this.draw();
  }

  draw() {
    const focused = document.activeElement?.closest("#places .chip")?.dataset.answer;
    $("places").replaceChildren(...(this.ranking.choosing ? this.slots() : this.ranks()));
    $("places").className = this.ranking.choosing ? "choosing" : "ranking";
    if (focused !== undefined) $("places").querySelector(`[data-answer="${focused}"]`)?.focus({ preventScroll: true });
    labelAnswers(this.ranking);
  }

  ranks() {
    const { tiers, pool } = this.ranking;
    const ranked = make("div", "ranked");
    ranked.append(make("span", "label", "Best"));
    tiers.forEach((tier, at) => ranked.append(this.gap(at), this.box(tier, at, `${at + 1}`, `Place ${at + 1}`)));
    ranked.append(this.gap(tiers.length), make("span", "label", "Worst"));
    return [this.poolBox(pool, "Not ranked yet"), ranked];
  }

  slots() {
    const [best, worst] = this.ranking.tiers;
    const parts = [this.box(best, 0, "Best", "Best"), this.poolBox(this.ranking.pool, "The others")];
    return [...parts, this.box(worst, 1, "Worst", "Worst")];
  }

  box(tier, at, title, label) {
    const box = make("div", "tier");
    Object.assign(box.dataset, { kind: "tier", at });
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", label);
    box.append(make("span", "number", title));
    const chips = make("div", "chips");
    chips.append(...tier.map((answer) => this.chip(answer, true)));
    if (!tier.length) chips.append(make("span", "soft", "drag one here"));
    box.append(chips);
    return box;
  }

  poolBox(pool, title) {
    const box = make("div", "pool");
    box.dataset.kind = "pool";
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", title);
    const chips = make("div", "chips");
    chips.append(...pool.map((answer) => this.chip(answer, true)));
    box.append(make("span", "label", title), chips);
    box.classList.toggle("empty", !pool.length);
    return box;
  }

  gap(at) {
    const gap = make("div", "gap");
    Object.assign(gap.dataset, { kind: "gap", at });
    if (!this.ranking.tiers.length) gap.append(make("span", "soft", "drag or tap, best first"));
    return gap;
  }

  /** A button with the answer's number and, on the board, its first words. */
  chip(answer, gist = false) {
    const chip = button("chip", `${answer + 1}`, (event) => this.tap(answer, event));
    chip.dataset.answer = answer;
    chip.setAttribute("aria-label", `Answer ${answer + 1}, ${this.ranking.describe(answer)}`);
    if (gist) {
      const words = make("span", "gist", this.texts[answer].slice(0, 80));
      words.dir = "auto";
      chip.append(words);
      chip.addEventListener("keydown", (event) => this.arrow(answer, event));
    }
    chip.addEventListener("pointerdown", (event) => this.press(chip, answer, event));
    return chip;
  }

  // ---- keys and taps

  tap(answer, event) {
    if (this.dragged) return; // the click at the end of a drag
    if (event.detail === 0) event.currentTarget.focus(); // by a key: the focus stays with the answer
    if (this.ranking.toggle(answer)) this.changed(answer);
  }

  arrow(answer, event) {
    const by = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (this.ranking.step(answer, by)) this.changed(answer);
  }

  // ---- dragging, by mouse, pen or finger

  press(chip, answer, event) {
    this.dragged = false;
    if (event.button !== 0 || this.held) return;
    this.held = { chip, answer, pointer: event.pointerId, x: event.clientX, y: event.clientY, ghost: null, over: null };
    if (chip.hasPointerCapture?.(event.pointerId)) chip.releasePointerCapture(event.pointerId);
  }

  move(event) {
    const held = this.held;
    if (!held || event.pointerId !== held.pointer) return;
    const far = Math.hypot(event.clientX - held.x, event.clientY - held.y);
    if (!held.ghost) {
      if (far < DRAG_FROM) return;
      this.lift(held);
    }
    event.preventDefault();
    const left = Math.min(event.clientX + 8, innerWidth - held.ghost.offsetWidth - 8);
    held.ghost.style.transform = `translate(${left}px, ${event.clientY - 56}px)`;
    const over = this.under(event.clientX, event.clientY);
    if (over !== held.over) {
      held.over?.classList.remove("over");
      over?.classList.add("over");
      held.over = over;
      $("hint").textContent = over ? this.effect(over, held.answer) : "";
    }
  }

  /** What a drop there would do, in words. */
  effect(over, answer) {
    if (over.dataset.kind === "gap") return "A place of its own";
    if (over.dataset.kind === "pool") return this.ranking.choosing ? "Neither best nor worst" : "Not ranked";
    const others = this.ranking.tiers[over.dataset.at].filter((other) => other !== answer);
    if (this.ranking.choosing) return over.dataset.at === "0" ? "Best" : "Worst";
    return others.length ? `Tie with ${others.map((other) => other + 1).join(" and ")}` : "";
  }

  lift(held) {
    held.ghost = make("div", "chip ghost", `${held.answer + 1}`);
    held.ghost.append(make("span", "gist", this.texts[held.answer].slice(0, 40)));
    document.body.append(held.ghost);
    held.chip.classList.add("lifted");
    document.body.classList.add("dragging");
  }

  drop(event) {
    const held = this.held;
    if (!held || event.pointerId !== held.pointer) return;
    this.dragged = Boolean(held.ghost);
    const over = this.dragged ? this.under(event.clientX, event.clientY) : null;
    this.release();
    this.settled();
    if (!over) return;
    const target = { kind: over.dataset.kind, at: Number(over.dataset.at) };
    if (this.ranking.place(held.answer, target)) this.changed(held.answer);
  }

  /** End a drag without a change. */
  release() {
    const held = this.held;
    this.held = null;
    held?.ghost?.remove();
    held?.over?.classList.remove("over");
    held?.chip.classList.remove("lifted");
    document.body.classList.remove("dragging");
  }

  /** The place under a point, or the nearest one within reach. */
  under(x, y) {
    let [best, least] = [null, REACH];
    for (const place of $("places").querySelectorAll("[data-kind]")) {
      const box = place.getBoundingClientRect();
      const away = Math.hypot(
        Math.max(box.left - x, 0, x - box.right),
        Math.max(box.top - y, 0, y - box.bottom),
      );
      if (away < least) [best, least] = [place, away];
    }
    return best;
  }
}
