// Metrics, from the marks of the records alone.

/**
 * Whether each proponent of a row is correct.
 *
 * @param judge "annotations", or "entailment": a score over the threshold.
 * @returns booleans in rank order, or null where the row has no such marks, or no passage at all is
 *     correct (`tda/viewer/summary.py`).
 */
export function marks(file, row, judge, threshold) {
  if (judge === "entailment") {
    const scores = file.columns.entailment?.[row];
    return scores ? scores.map((s) => s !== null && s > threshold) : null;
  }
  const correct = file.columns.correct?.[row];
  return correct === null || correct === undefined ? null : Array.from(correct, (c) => c === "1");
}

/** What a file's proponents can be judged by. */
export function judges(file) {
  return ["annotations", "entailment"].filter((j) =>
    file.fields.includes(j === "annotations" ? "correct" : "entailment")
  );
}

/** The rank of the first correct proponent, from 1; null where none is. */
export function firstRank(marks) {
  const at = marks ? marks.indexOf(true) : -1;
  return at < 0 ? null : at + 1;
}

/**
 * MRR, recall and precision over rows.
 *
 * @param marks the marks of each row; null where a row has none, which is then left out.
 * @param k recall: share of rows with a correct one in the first k; precision: share of the first
 *     k (or of all, where there are fewer) that are correct. The rank of a row that has no correct
 *     one among its proponents is taken as infinite.
 * @returns {n, mrr, recall, precision}; the last three null where n is 0.
 */
export function metrics(marks, k = 10) {
  let n = 0, reciprocal = 0, hits = 0, precise = 0;
  for (const row of marks) {
    if (!row) continue;
    n++;
    const rank = firstRank(row);
    if (rank) reciprocal += 1 / rank;
    if (rank && rank <= k) hits++;
    const first = row.slice(0, k);
    if (first.length) precise += first.filter(Boolean).length / first.length;
  }
  if (!n) return { n, mrr: null, recall: null, precision: null };
  return { n, mrr: reciprocal / n, recall: hits / n, precision: precise / n };
}

/** Rows by a key, largest group first; rows whose key is null are left out. */
export function groups(rows, key) {
  const out = new Map();
  for (const row of rows) {
    const name = key(row);
    if (name === null || name === undefined) continue;
    if (!out.has(name)) out.set(name, []);
    out.get(name).push(row);
  }
  return [...out].sort((a, b) => b[1].length - a[1].length);
}

/** Bins of equal width: [{low, high, rows}], the last with its upper end. */
export function histogram(rows, value, bins = 20) {
  const known = rows.filter((r) => typeof value(r) === "number");
  if (!known.length) return [];
  let low = Infinity, high = -Infinity;
  for (const row of known) {
    low = Math.min(low, value(row));
    high = Math.max(high, value(row));
  }
  if (low === high) return [{ low, high, rows: known }];
  const width = (high - low) / bins;
  const out = Array.from({ length: bins }, (_, i) => ({
    low: low + i * width,
    high: i + 1 === bins ? high : low + (i + 1) * width,
    rows: [],
  }));
  for (const row of known) {
    // The edges decide, as they do in a filter; the division may fall beside one.
    let i = Math.min(bins - 1, Math.floor((value(row) - low) / width));
    while (i > 0 && value(row) < out[i].low) i--;
    while (i + 1 < bins && value(row) >= out[i + 1].low) i++;
    out[i].rows.push(row);
  }
  return out;
}
