"""From a corpus to gradients: the one path that `tda.trace` and runs share.

    documents ── tda.data.tokenised, tda.data.tokens ──▶ TokenTable      rows of token ids
    TokenTable ── tda.data.batches.BatchLayout ──▶ Batch                 padded [B, T]
    Batch ── tda.gradients.encoder.Encoder ──▶ float32 [B, E]            projected gradients
    table.encode_rows   collects them in memory, in the order of the rows
    table.fill_store    writes them to a store (tda.store), a shard at a time, resumable
    table.OnTheFly      encodes them again whenever they are searched, without a store

`inputs` turns the arguments of `tda.trace` into a table, an encoder and a store; `tda.run.encode`
does so for the config of a run. `loss_identity` tells whose loss the stored gradients are of.
"""
