"""Table 2 on Wikipedia without labels: first paragraphs, whole articles, and T-REx sentences.

    python -m experiments.table2 --config=configs/open_wiki.py --workdir=runs/open_wiki \\
        --config.data.corpus=LEADS.jsonl.gz,ARTICLES.jsonl.gz,SENTENCES.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

`--config=configs/open_wiki.py:small` takes a twentieth of the documents (name the first and the
third file alone) and 100 queries. Queries are facts whose subject and target some passage names.
The judge goes by names (`lexical`); of a model: --config.judge.name=nli --config.judge.model=DIR.

Cost: the small one trains on 1.4M tokens and encodes 0.4M twice; the other takes many hours.
"""

import importlib.util
import pathlib
import runpy

from tda.run import defaults


def get_config(size: str = "full"):
    """The config of table 2."""
    if size not in ("full", "small"):
        raise ValueError(f"open_wiki.py:{size}: give full or small after the colon")
    c = defaults.get_config()
    has_dense = importlib.util.find_spec("sentence_transformers")
    dense = "dense," if has_dense else ""
    c.methods = (
        f"bm25,{dense}grad_dot,grad_cos,exp5,trackstar,rerank_trackstar,rerank_bm25,rrf,random"
    )
    # By its path, since the files of an installed package are not on Python's path.
    table1 = pathlib.Path(__file__).with_name("trex_table1.py")
    c.dense.model = runpy.run_path(str(table1))["sentence_encoder"]()
    # The files' own names of texts and of ids, which have to differ between the files.
    c.data.text_field = "text,abstract"
    c.data.id_field = "sentence_id,abstract_uri,title"
    c.data.pool = "named"
    # The five relations whose aligned sentences state the fact least often.
    c.data.exclude_relations = "P527,P138,P20,P937,P463"
    c.data.n_queries = 1000
    c.tokenizer.vocab_size = 8192
    c.model.size = "small"
    c.train.epochs = 2.0
    c.train.learning_rate = 1.5e-3
    c.train.warmup = 200
    c.projection.pooling = "matrix"
    c.projection.side = 32
    c.store.dtype = "int8"
    c.judge.name = "lexical"
    if size == "small":
        c.data.share = 0.05
        c.data.n_queries = 100
        c.tokenizer.vocab_size = 4096
        c.model.size = "tiny"
        c.train.epochs = 4.0
        c.train.learning_rate = 3e-3
        c.train.warmup = 50
        c.projection.side = 16
        c.rerank.passages = 50
        c.eval.tail_patch_queries = 50
        c.eval.sampled_queries = 20
    return c
