// What opens over the page: help, and opening further results.

import { fill, h, tell } from "./dom.js";
import { ask } from "./data.js";

/** Shows a dialog; it closes by Escape, by its button, or by a click beside it. */
function dialog(title, ...inside) {
  const box = h("dialog", { "aria-labelledby": "dialog-title" },
    h("header", {}, h("h2", { id: "dialog-title" }, title),
      h("button", { type: "button", "aria-label": "Close", onclick: () => box.close() }, "×")),
    inside);
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", (e) => e.target === box && box.close());
  document.body.append(box);
  box.showModal();
  return box;
}

const KEYS = [
  ["j  k", "next query, previous query"],
  ["r", "a random query"],
  ["/", "go to the filter"],
  ["g", "jump to a number or id"],
  ["p  o  b", "proponents, opponents, both"],
  ["1 … 9", "show or hide a method"],
  ["v  t  n  q", "overview, trace, notes, queries"],
  ["d", "dark or light"],
  ["?", "this help"],
];

const EXAMPLES = [
  ["paris", "the word is in prompt, target or id"],
  ["rank <= 3", "the first correct proponent is among the first three"],
  ["found = no and confidence >= 0.5", "the model is sure, and no proponent is correct"],
  ['relation = "place of birth"', "quote values with spaces"],
  ["prompt ~ capital or prompt ~ river", "~ contains, !~ does not"],
  ["frequency < 1000 (rank = 1 or hits > 4)", "conditions side by side are joined by and"],
  ["rank = 1 and bm25.rank > 1", "another file's field, by its label"],
  ["bm25.overlap = 0", "no proponent shared with another file"],
];

/** Explains the filter and the keys. */
export function showHelp(rows) {
  dialog("Help",
    h("h3", {}, "Filter"),
    h("table.help", {}, h("tbody", {}, EXAMPLES.map(([text, meaning]) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, text)), h("td", {}, meaning))))),
    h("p", {}, "Operators: ", h("code", {}, "= != < <= > >= ~ !~ and or not ( )"), ". A query that lacks a field matches only != and !~."),
    h("p", {}, "Fields: ", rows.fields().map((f, i) => [i ? ", " : "", h("code", {}, f)]), "."),
    h("h3", {}, "Keys"),
    h("table.help", {}, h("tbody", {}, KEYS.map(([key, meaning]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, meaning))))));
}

/** Opens a further file of results: from this machine, or from an address. */
export function showOpen(index, onOpened) {
  const status = h("p", { role: "status" });
  const opened = async (work) => {
    fill(status, "Opening…");
    try {
      const { label } = await work();
      box.close();
      tell(`Opened ${label}.`);
      onOpened(label);
    } catch (error) {
      fill(status, h("span.wrong", {}, error.message));
    }
  };
  const file = h("input", { type: "file", id: "open-file", accept: ".jsonl,.gz,.json" });
  const url = h("input", { type: "url", id: "open-url", placeholder: "https://…/results.jsonl", disabled: !index.urls });
  const box = dialog("Open results",
    h("form", {
      onsubmit: (e) => {
        e.preventDefault();
        if (file.files.length) opened(() => ask(`upload?name=${encodeURIComponent(file.files[0].name)}`, file.files[0]));
      },
    }, h("label", { for: "open-file" }, "A file (JSON lines, may be gzipped)"), file, h("button", { type: "submit" }, "Open")),
    h("form", {
      onsubmit: (e) => {
        e.preventDefault();
        opened(() => ask("open", { url: url.value }));
      },
    }, h("label", { for: "open-url" }, "An address"), url, h("button", { type: "submit", disabled: !index.urls }, "Fetch"),
    !index.urls && h("p.quiet", {}, "The viewer fetches nothing from other sites unless it is started with --allow_urls or with a URL in --results.")),
    status);
}
