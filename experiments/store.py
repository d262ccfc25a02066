"""Looks after gradient stores.

    python -m experiments.store info DIR       what it holds, and how far it is
    python -m experiments.store verify DIR     reads all of it; removes shards that are damaged
    python -m experiments.store withdraw DIR --ids=a,b --documents=c

A shard that was removed is encoded again by the next run of what made the store, and it alone.
Passages that were withdrawn are never retrieved and take no part in R.
"""

import sys

from absl import app, flags, logging

from tda import store as stores
from tda.runtime import progress

_REPORT = flags.DEFINE_bool("report_only", False, "verify: remove nothing.")
_IDS = flags.DEFINE_list("ids", [], "withdraw: ids of passages.")
_DOCUMENTS = flags.DEFINE_list("documents", [], "withdraw: documents, all of whose passages go.")


def info(path: str) -> int:
    """Prints what a store holds; returns the exit status."""
    store = stores.open_store(path)
    shards, missing, m = store.shards(), store.missing(), store.manifest
    row_bytes = store.form.row_bytes + (4 * len(store.form.widths) if m["dtype"] == "int8" else 0)
    rows_done = store.rows - sum(shards[i].stop - shards[i].start for i in missing)
    print(f"{store.path}")
    print(f"  rows        {store.rows:,} of {store.width:,} numbers, {m['dtype']}")
    print(f"  size        {store.rows * row_bytes / 2**30:,.2f} GiB when finished")
    print(f"  blocks      {len(m['blocks'])}: {_shortened(m['blocks'])}")
    print(f"  segments    {len(m['segments'])}: {[s['rows'] for s in m['segments']]} rows")
    print(f"  written     {len(shards) - len(missing)} of {len(shards)} shards, {rows_done:,} rows")
    if missing:
        print(f"  missing     shards {_shortened(missing)}")
    print(f"  withdrawn   {len(store.withdrawn):,} rows")
    for key, value in sorted(m["fingerprint"].items()):
        text = f"{len(value)} entries" if isinstance(value, dict) and len(value) > 8 else value
        print(f"  {key:<11} {text}")
    return 0


def verify(path: str, report_only: bool = False) -> int:
    """Reads all of a store and names what is damaged; returns the exit status.

    A shard that is damaged is removed, for it cannot be read, and the next run writes it again.
    """
    store = stores.open_store(path)
    shards, missing, damaged = store.shards(), set(store.missing()), []
    with progress.bar(len(shards), "verify", "shard") as bar:
        for i in range(len(shards)):
            wrong = None if i in missing else store.damage(i)
            if wrong:
                damaged.append(i)
                rows = f"rows {shards[i].start:,} to {shards[i].stop - 1:,}"
                bar.write(f"shard {i} ({rows}): {wrong}", file=sys.stdout)
            bar.update()
    files = store.damaged_passages()
    for name, wrong in files.items():
        print(f"{name}: {wrong}")
    if not report_only:
        for i in damaged:
            store.remove(i)
        for name in files:
            store.remove_passages(name)
    told = "left as they are" if report_only else "removed; the next run writes them again"
    whole = len(shards) - len(missing) - len(damaged)
    print(f"{whole} of {len(shards)} shards are whole, {len(missing)} are not written yet")
    if damaged:
        print(f"{len(damaged)} damaged: {_shortened(damaged)} ({told})")
    if files:
        print(f"{len(files)} files of passages are damaged: {_shortened(list(files))} ({told})")
    return 1 if damaged or files else 0


def withdraw(path: str, ids: list[str], documents: list[str]) -> int:
    """Withdraws passages; returns the exit status."""
    if not ids and not documents:
        raise ValueError("name what to withdraw: --ids=a,b or --documents=c")
    store = stores.open_store(path)
    count = store.withdraw(ids, documents)
    print(f"{count:,} rows are withdrawn, {len(store.withdrawn):,} in all")
    return 0


def _shortened(items: list, most: int = 12) -> str:
    text = ", ".join(map(str, items[:most]))
    return text + (f", … ({len(items)} in all)" if len(items) > most else "")


def main(argv):
    """Parses what to do and with which store."""
    commands = ("info", "verify", "withdraw")
    if len(argv) != 3 or argv[1] not in commands:
        sys.exit(f"usage: python -m experiments.store {'|'.join(commands)} DIR")
    _, command, path = argv
    logging.set_verbosity(logging.WARNING)  # what the libraries tell of themselves is not news
    try:
        if command == "info":
            status = info(path)
        elif command == "verify":
            status = verify(path, _REPORT.value)
        else:
            status = withdraw(path, _IDS.value, _DOCUMENTS.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    app.run(main)
