"""Commands on a store: prints its contents, finds damaged files, withdraws passages."""

import sys

from tda.runtime import progress
from tda.runtime.differences import shorten
from tda.store.making import open_store

# The most names that a line lists.
_MOST = 12


def info(path: str) -> int:
    """Prints the contents of a store; returns the exit status."""
    store = open_store(path)
    shards, missing, m = store.shards(), store.missing(), store.manifest
    rows_done = store.rows - sum(shards[i].stop - shards[i].start for i in missing)
    print(f"{store.path}")
    pairs = f" in {store.form.rank} pairs of vectors a block" if store.form.rank else ""
    print(f"  rows        {store.rows:,} of {store.width:,} numbers, {m['dtype']}{pairs}")
    print(f"  size        {store.rows * store.form.row_bytes / 2**30:,.2f} GiB when finished")
    print(f"  blocks      {len(m['blocks'])}: {shorten(m['blocks'], _MOST)}")
    print(f"  segments    {len(m['segments'])}: {[s['rows'] for s in m['segments']]} rows")
    print(f"  written     {len(shards) - len(missing)} of {len(shards)} shards, {rows_done:,} rows")
    if missing:
        print(f"  missing     shards {shorten([*map(str, missing)], _MOST)}")
    print(f"  withdrawn   {len(store.withdrawn):,} rows")
    for key, value in sorted(m["fingerprint"].items()):
        # A shape for each parameter would fill pages.
        text = f"{len(value)} entries" if isinstance(value, dict) and len(value) > 8 else value
        print(f"  {key:<11} {text}")
    return 0


def verify(path: str, report_only: bool = False) -> int:
    """Reads all of a store and names damaged files; returns the exit status.

    Removes damaged shards unless `report_only`; the next run writes them again.
    """
    store = open_store(path)
    shards, missing, damaged = store.shards(), set(store.missing()), []
    with progress.bar(len(shards), "verify", "shard") as bar:
        for i in range(len(shards)):
            damage = None if i in missing else store.damage(i)
            if damage:
                damaged.append(i)
                rows = f"rows {shards[i].start:,} to {shards[i].stop - 1:,}"
                # Through the bar, which a plain print would break.
                bar.write(f"shard {i} ({rows}): {damage}", file=sys.stdout)
            bar.update()
    files = store.damaged_passages()
    for name, damage in files.items():
        print(f"{name}: {damage}")
    if not report_only:
        for i in damaged:
            store.remove(i)
        for name in files:
            store.remove_passages(name)
    remark = "not removed" if report_only else "removed; the next run writes them again"
    intact = len(shards) - len(missing) - len(damaged)
    print(f"{intact} of {len(shards)} shards are intact, {len(missing)} are not written yet")
    if damaged:
        print(f"{len(damaged)} damaged: {shorten([*map(str, damaged)], _MOST)} ({remark})")
    if files:
        print(f"{len(files)} files of passages are damaged: {shorten([*files], _MOST)} ({remark})")
    return 1 if damaged or files else 0


def withdraw(path: str, ids: list[str], documents: list[str]) -> int:
    """Withdraws passages; returns the exit status."""
    if not ids and not documents:
        raise ValueError("name what to withdraw: --ids=a,b or --documents=c")
    store = open_store(path)
    count = store.withdraw(ids, documents)
    print(f"{count:,} rows are withdrawn, {len(store.withdrawn):,} in all")
    return 0
