// The pieces of data, by name: from the server as JSON, or in an export as script files.

const isExport = document.documentElement.hasAttribute("data-export");
const waiting = new Map();
const MOST_CHUNKS = 60;

// An export's files call this; JSON alone could not be read from file://.
globalThis.viewerData = (name, value) => {
  waiting.get(name)?.(value);
  waiting.delete(name);
};

function fromScript(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    waiting.set(name, (value) => {
      script.remove();
      resolve(value);
    });
    script.onerror = () => reject(new Error(`data/${name}.js is missing from this export`));
    script.src = `data/${name}.js`;
    document.head.append(script);
  });
}

async function fromServer(name, digests) {
  // The server refuses pieces of a file that has changed since the index was read.
  const parameters = new URLSearchParams(digests.map((digest) => ["digest", digest]));
  return readBody(await request(`data/${name}.json?${parameters}`, {}));
}

async function request(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    throw new Error("the viewer's server does not answer; is it still running?");
  }
}

async function readBody(response) {
  const body = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Error(body.error);
  return body;
}

/** A piece of the data; `digests` are those, in the index, of the files that it is of. */
const piece = (name, ...digests) => (isExport ? fromScript(name) : fromServer(name, digests));

/** Asks the server to do something; `body` is sent as JSON, a File as it is. */
export async function ask(address, body, method = "POST") {
  const headers = { "x-viewer-token": document.documentElement.dataset.token };
  if (!(body instanceof Blob) && body !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  return readBody(await request(`api/${address}`, { method, headers, body }));
}

/** Everything that is shown. */
export class Data {
  /** Reads the index; rows follow with `load`. */
  async open() {
    this.index = await piece("index");
    this.index.live &&= !isExport;
    this.index.upload &&= !isExport;
    this.canNote = this.index.notes && !isExport;
    this.files = this.index.files.map((described, number) => ({
      ...described,
      number,
      columns: Object.fromEntries(described.fields.map((f) => [f, []])),
      loaded: 0,
      byId: new Map(),
      byQuery: new Map(),
      overlaps: new Map(),
    }));
    this.records = new Map();
    this.loading = new Map();
    this.grouped = new Map();
    this.figures = undefined; // of the board
    await this.readNotes();
  }

  file(label) {
    return this.files.find((f) => f.label === label);
  }

  /** Loads a file's rows; `onRows` is called after each chunk. Called again, it waits for them. */
  load(file, onRows) {
    if (!this.loading.has(file.label)) {
      const loaded = this.#load(file, onRows);
      this.loading.set(file.label, loaded);
      // What failed is asked for again from where it stopped.
      loaded.catch(() => this.loading.delete(file.label));
    }
    return this.loading.get(file.label);
  }

  async #load(file, onRows) {
    const size = this.index.summary_rows;
    for (let chunk = file.loaded / size; chunk * size < file.rows; chunk++) {
      const part = await piece(`${file.number}/summaries-${chunk}`, file.digest);
      const rows = Math.min(size, file.rows - chunk * size);
      for (const field of file.fields) {
        const values = part[field] ?? new Array(rows).fill(null);
        for (const value of values) file.columns[field].push(value);
      }
      for (let row = file.loaded; row < file.loaded + rows; row++) {
        first(file.byId, file.columns.id?.[row], row);
        first(file.byQuery, file.columns.query?.[row], row);
      }
      file.loaded += rows;
      onRows?.(file);
    }
  }

  /** A record of a file; the chunks asked for last are kept. */
  async record(file, row) {
    const size = this.index.record_rows;
    const name = `${file.number}/records-${Math.floor(row / size)}`;
    const chunk = this.records.get(name) ?? piece(name, file.digest);
    this.records.delete(name);
    this.records.set(name, chunk);
    if (this.records.size > MOST_CHUNKS) this.records.delete(this.records.keys().next().value);
    try {
      return (await chunk)[row % size];
    } catch (error) {
      this.records.delete(name);
      throw error;
    }
  }

  /** The board's figures; read once. */
  board() {
    return (this.figures ??= piece("board", this.index.board));
  }

  /** The changes of loss of a query of the board. */
  changes(query) {
    return piece(`board-${query}`, this.index.board);
  }

  /** How many proponents each row of a file shares with another file; fills `file.overlaps`. */
  async overlap(file, other) {
    if (!file.overlaps.has(other.label)) {
      file.overlaps.set(other.label, await piece(`overlap-${file.number}-${other.number}`, file.digest, other.digest));
    }
    return file.overlaps.get(other.label);
  }

  /** The figures of a file's passages by a key, of the query in a row or of all; read once. */
  groups(file, key, row) {
    const name = `${file.number}/by-${key}${row === undefined ? "" : `-${row}`}`;
    if (!this.grouped.has(name)) {
      this.grouped.set(name, piece(name, file.digest));
      this.grouped.get(name).catch(() => this.grouped.delete(name));
    }
    return this.grouped.get(name);
  }

  async readNotes() {
    this.#take(await piece("notes"));
  }

  #take({ notes, counts }) {
    this.counts = counts;
    this.notes = new Map(notes.map((n) => [noteKey(n, n.passage_id), n]));
  }

  /** The note on a passage of a query (`queryOf`). */
  note(query, passage) {
    return this.notes.get(noteKey(query, passage));
  }

  /** Saves {passage_id, type, comment, method} as the note on a passage of a query. */
  async saveNote(query, note) {
    this.#take(await ask("notes", { ...query, ...note }));
  }

  /** Runs a live question to its end; `onProgress(job)` hears of it. */
  async live(what, body, onProgress) {
    let job = await ask(`live/${what}`, body);
    let pause = 60;
    while (job.state === "waiting" || job.state === "running") {
      onProgress?.(job);
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(400, pause * 1.3);
      job = await ask(`jobs/${job.number}`, undefined, "GET");
    }
    if (job.state === "failed") throw new Error(job.error);
    return job;
  }

  cancel(job) {
    return ask(`jobs/${job.number}`, undefined, "DELETE");
  }
}

/** What identifies a record's query: ids alone may stand for other questions in other files. */
export const queryOf = (record) => ({
  example_id: String(record.example_id ?? ""),
  prompt: String(record.inputs_plaintext),
  target: String(record.targets_plaintext),
});

const noteKey = (query, passage) => JSON.stringify([query.example_id, query.prompt, query.target, passage]);

/** Sets a map's value unless it has one, or the key is missing. */
function first(map, key, value) {
  if (key !== null && key !== undefined && !map.has(key)) map.set(key, value);
}
