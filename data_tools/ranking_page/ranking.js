// The ranking of one prompt's answers: pure state, without the page. Answers are indices 0..count-1.

/** Places are tiers of tied answers, best first. In the mode "best-worst" there are two, best and worst, of one answer
 * each; all others are in the pool. Every change can be undone. */
class Ranking {
  constructor(count, mode) {
    this.count = count;
    this.choosing = mode === "best-worst";
    this.tiers = this.choosing ? [[], []] : [];
    this.tieNext = false;
    this.past = [];
    this.future = [];
  }

  get pool() {
    const placed = new Set(this.tiers.flat());
    return [...Array(this.count).keys()].filter((answer) => !placed.has(answer));
  }

  get complete() {
    return this.choosing ? this.tiers.every((tier) => tier.length === 1) : this.pool.length === 0;
  }

  /** The tiers that are saved, best first. */
  result() {
    const [best, worst] = this.tiers;
    return this.choosing ? [best, this.pool, worst].filter((tier) => tier.length) : this.tiers;
  }

  /** Take over saved tiers, or those of a draft. */
  restore(tiers) {
    this.tiers = this.choosing && tiers.length ? [tiers[0], tiers[tiers.length - 1]] : tiers;
    this.tiers = this.tiers.map((tier) => [...tier]);
  }

  /** Index of the tier of an answer, -1 in the pool. */
  tierOf(answer) {
    return this.tiers.findIndex((tier) => tier.includes(answer));
  }

  /** Move an answer to {kind: "tier", at}, to {kind: "gap", at} (a place of its own before tier `at`), or to
   * {kind: "pool"}. False if nothing changes. */
  place(answer, target) {
    const before = JSON.stringify(this.tiers);
    const from = this.tierOf(answer);
    const tiers = this.tiers.map((tier) => tier.filter((other) => other !== answer));
    if (target.kind === "tier") {
      tiers[target.at] = this.choosing ? [answer] : [...tiers[target.at], answer];
      if (this.choosing && this.count === 2) tiers[1 - target.at] = [1 - answer];
    } else if (target.kind === "gap") {
      tiers.splice(target.at, 0, [answer]);
    }
    const next = this.choosing ? tiers : tiers.filter((tier) => tier.length);
    if (target.kind === "tier" && from === target.at) return false;
    if (JSON.stringify(next) === before) return false;
    this.change(next);
    return true;
  }

  change(tiers) {
    this.past.push(this.tiers);
    this.future = [];
    this.tiers = tiers;
    this.tieNext = false;
  }

  /** What a tap or a digit does: the next place (or a tie with the last one) for an answer in the pool, and the pool
   * for one that has a place. */
  toggle(answer) {
    if (this.tierOf(answer) >= 0) return this.place(answer, { kind: "pool" });
    if (this.choosing) {
      const free = this.tiers.findIndex((tier) => !tier.length);
      return free >= 0 && this.place(answer, { kind: "tier", at: free });
    }
    const last = this.tiers.length - 1;
    if (this.tieNext && last >= 0) return this.place(answer, { kind: "tier", at: last });
    return this.place(answer, { kind: "gap", at: last + 1 });
  }

  /** Half a place up (-1) or down (+1): an answer alone joins its neighbours; a tied one gets a place of its own. */
  step(answer, by) {
    const at = this.tierOf(answer);
    if (this.choosing) {
      const to = at < 0 ? (by < 0 ? 0 : 1) : at === (by < 0 ? 1 : 0) ? -1 : at;
      return to !== at && this.place(answer, to < 0 ? { kind: "pool" } : { kind: "tier", at: to });
    }
    if (at < 0) return this.toggle(answer);
    if (this.tiers[at].length > 1) return this.place(answer, { kind: "gap", at: by < 0 ? at : at + 1 });
    const to = at + by;
    return to >= 0 && to < this.tiers.length && this.place(answer, { kind: "tier", at: to });
  }

  undo() {
    if (!this.past.length) return false;
    this.future.push(this.tiers);
    this.tiers = this.past.pop();
    return true;
  }

  redo() {
    if (!this.future.length) return false;
    this.past.push(this.tiers);
    this.tiers = this.future.pop();
    return true;
  }

  /** The place of an answer in words. */
  describe(answer) {
    const at = this.tierOf(answer);
    if (this.choosing) return at < 0 ? "not chosen" : at ? "worst" : "best";
    if (at < 0) return "not ranked yet";
    const others = this.tiers[at].filter((other) => other !== answer).map((other) => other + 1);
    const tied = others.length ? `, tied with ${others.join(" and ")}` : "";
    return `place ${at + 1} of ${this.tiers.length}${tied}`;
  }
}

/** A random order of 0..count-1 that depends on the text alone: xmur3 as hash, mulberry32, Fisher and Yates. */
function shuffled(count, text) {
  let state = 1779033703 ^ text.length;
  for (let i = 0; i < text.length; i++) {
    state = Math.imul(state ^ text.charCodeAt(i), 3432918353);
    state = (state << 13) | (state >>> 19);
  }
  const random = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
  const order = [...Array(count).keys()];
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}
