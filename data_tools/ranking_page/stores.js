// Where votes go: to the server that the page comes from, or into this browser's storage for a file without a server.
// Both have join, next, open and save, which give {task, skipped, progress}; a task is {item, version, vote}.

const random = () => Math.random().toString(36).slice(2) + Math.random().toString(36).slice(2);

/** localStorage under keys of this dataset. In private windows and some viewers of files there is none; then values
 * last as long as the page, and `lasting` is false. */
class Drawer {
  constructor(prefix) {
    this.prefix = prefix;
    this.memory = new Map();
    try {
      localStorage.setItem(`${prefix} test`, "1");
      localStorage.removeItem(`${prefix} test`);
      this.lasting = true;
    } catch {
      this.lasting = false;
    }
  }

  get(key) {
    const found = this.lasting ? localStorage.getItem(`${this.prefix} ${key}`) : this.memory.get(key);
    try {
      return found ? JSON.parse(found) : null;
    } catch {
      return null;
    }
  }

  /** Throws where the storage is full. */
  set(key, value) {
    if (this.lasting) localStorage.setItem(`${this.prefix} ${key}`, JSON.stringify(value));
    else this.memory.set(key, JSON.stringify(value));
  }

  remove(key) {
    if (this.lasting) localStorage.removeItem(`${this.prefix} ${key}`);
    else this.memory.delete(key);
  }
}

/** A name as it is kept: Unicode NFC, single spaces. As `annotator_name` in votes.py. */
function kept(name) {
  return name.normalize("NFC").trim().replace(/\s+/g, " ");
}

/** What is wrong with a name, in words; empty if nothing is. A result under a bad name could not be merged. */
function nameFault(name, longest) {
  const seen = kept(name).replace(/[\u200c\u200d]/g, ""); // joiners, which Persian and emoji need
  if (!seen) return "Enter a name.";
  if (/[\p{C}\p{Zl}\p{Zp}]/u.test(seen)) return "The name has characters that cannot be seen. Please type it again.";
  return [...kept(name)].length > longest ? `The name is longer than ${longest} characters. Enter a shorter one.` : "";
}

class Conflict extends Error {
  constructor(task) {
    super("conflict");
    this.task = task;
  }
}

class ServerStore {
  constructor() {
    this.tab = random();
    this.annotator = "";
  }

  async join(annotator) {
    const found = await this.ask("join", { annotator, tab: this.tab });
    this.annotator = found.annotator;
    return found;
  }

  /** `heldToo`: also a prompt that others have on their screens. */
  next(heldToo = false) {
    return this.ask("next", { held_too: heldToo });
  }

  open(item) {
    return this.ask("open", { item });
  }

  save(vote, version) {
    return this.ask("save", { vote, version });
  }

  /** Throws Conflict, or an Error whose `fatal` says that asking again does not help. */
  async ask(action, body) {
    let reply;
    try {
      reply = await fetch(action, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ annotator: this.annotator, ...body }),
      });
    } catch {
      throw new Error("The server cannot be reached.");
    }
    const found = await reply.json().catch(() => ({ error: `The server answers ${reply.status}.` }));
    if (reply.status === 409) throw new Conflict(found);
    if (!reply.ok) throw Object.assign(new Error(found.error), { fatal: reply.status < 500 });
    return found;
  }
}

/** Votes in a Drawer, one key for each prompt, so that two tabs do not overwrite each other's. */
class FileStore {
  constructor(items, settings, drawer) {
    Object.assign(this, { items, settings, drawer });
    this.byId = new Map(items.map((item) => [item.id, item]));
    this.annotator = "";
  }

  async join(annotator) {
    this.annotator = kept(annotator);
    const decided = this.votes().filter((vote) => vote.verdict !== "skipped");
    const history = decided.sort((a, b) => (a.time < b.time ? -1 : 1)).map((vote) => vote.item);
    return { annotator: this.annotator, history, shared: false, ...(await this.next()) };
  }

  record(item) {
    return this.drawer.get(`vote ${this.annotator} ${item}`) ?? { version: 0, vote: null };
  }

  votes() {
    return this.items.map((item) => this.record(item.id).vote).filter((vote) => vote);
  }

  task(item) {
    return { item, ...this.record(item.id), progress: this.progress() };
  }

  async next() {
    const open = this.items.filter((item) => !this.record(item.id).vote);
    const skipped = this.votes().filter((vote) => vote.verdict === "skipped");
    skipped.sort((a, b) => (a.time < b.time ? -1 : 1));
    const item = open[0] ?? this.byId.get(skipped[0]?.item);
    const task = item ? this.task(item) : null;
    return { task, skipped: !open.length && Boolean(item), progress: this.progress() };
  }

  async open(item) {
    return this.task(this.byId.get(item));
  }

  async save(vote, version) {
    const record = this.record(vote.item);
    if (record.version !== version) throw new Conflict(this.task(this.byId.get(vote.item)));
    this.put({ ...vote, time: new Date().toISOString() }, version + 1);
    return this.next();
  }

  put(vote, version) {
    try {
      this.drawer.set(`vote ${this.annotator} ${vote.item}`, { version, vote });
    } catch {
      const text = "This browser's storage is full. Save the result, and close other pages.";
      throw Object.assign(new Error(text), { fatal: true });
    }
  }

  progress() {
    const count = (verdict) => this.votes().filter((vote) => vote.verdict === verdict).length;
    const ranked = this.votes().filter((vote) => vote.verdict === "ranked");
    const took = ranked.map((vote) => vote.seconds).sort((a, b) => a - b);
    const done = ranked.length + count("cannot-tell");
    return {
      ranked: ranked.length, cannot_tell: count("cannot-tell"), skipped: count("skipped"),
      left: this.items.length - done, seconds: took.length < 3 ? null : took[Math.floor(took.length / 2)],
    };
  }

  /** The file that the annotator sends back. */
  result() {
    const { fingerprint, mode, seed } = this.settings;
    const head = { format: "rlhf-ranking-result", version: 1, fingerprint, mode, seed, annotator: this.annotator };
    return { ...head, votes: this.votes() };
  }

  /** Take over a result that was saved elsewhere; votes that are here already stay. The number of votes taken. */
  restore(result) {
    const fits = result?.format === "rlhf-ranking-result" && result.fingerprint === this.settings.fingerprint;
    if (!fits || !Array.isArray(result.votes)) throw new Error("This file is not a result of this page.");
    this.annotator = String(result.annotator);
    const fresh = result.votes.filter((vote) => this.canShow(vote) && !this.record(vote.item).vote);
    for (const vote of fresh) this.put(vote, 1);
    return fresh.length;
  }

  /** Whether a vote of a file, which somebody may have edited, is one on a prompt of this page and its answers. */
  canShow(vote) {
    const item = this.byId.get(vote?.item);
    const known = (answer) => Number.isInteger(answer) && answer >= 0 && answer < item.answers.length;
    const tiers = (places) => Array.isArray(places) && places.every((tier) => Array.isArray(tier) && tier.every(known));
    return Boolean(item) && typeof vote.time === "string" && Number.isFinite(vote.seconds) && tiers(vote.tiers);
  }
}
