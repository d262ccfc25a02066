"""From a corpus to gradients: the one path that `tda.trace` and runs share.

    documents ── tda.data.tokenised, tda.data.tokens ──▶ TokenTable      rows of token ids
    TokenTable ── tda.data.batches.BatchLayout ──▶ Batch                 padded [B, T]
    Batch ── tda.gradients.encoder.Encoder ──▶ float32 [B, E]            projected gradients
    table.encode_rows   collects them in memory, in the order of the rows
    table.fill_stores   writes them to stores (tda.store), a shard at a time, resumable
    table.OnTheFly      encodes them again at every search, without a store

`inputs` turns the arguments of `tda.trace` into a table, an encoder and a store; `tda.run.encode`
does so for the config of a run. `loss_identity` hashes the loss whose gradients are stored.
"""
