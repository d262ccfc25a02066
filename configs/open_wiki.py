"""Table 2 on Wikipedia without labels: first paragraphs, whole articles, and T-REx sentences.

    python -m experiments.table2 --config=configs/open_wiki.py --workdir=runs/open_wiki \\
        --config.data.corpus=LEADS.jsonl.gz,ARTICLES.jsonl.gz,SENTENCES.jsonl.gz \\
        --config.data.facts=trex_lama_facts.jsonl.gz

Queries are facts whose subject and target some passage names.
`--config=configs/open_wiki.py:small` takes a fiftieth of the documents (name the first and the
third file alone) and 100 queries.

`:copa`, `:piqa`, `:arithmetic`, `:word_problems`, `:stories`, `:wrong`, `:known_1000` and `:popqa`,
also as `:small,copa`, ask another set of queries by `python -m experiments.trace`, with
--config.data.queries=FILE in place of data.facts. The file of `wrong` is a run's results, and its
targets are the model's answers. As in the paper, all but facts have R of the passages alone.
What SmolLM2-135M does of them: results/README.md, "Other tasks".

The judge goes by names (`lexical`); of a model: --config.judge.name=nli --config.judge.model=DIR.

Cost: the small one takes 13 minutes on 2 busy CPU cores, and 0.1 GB; the other many hours.
Expected AIS-MRR of the small one, by the judge of names: BM25 0.94, dense 0.83, rrf 0.58,
rerank_bm25 0.39, rerank_trackstar 0.26, TrackStar 0.21, gradient cosine 0.08, random 0
(results/README.md).
"""

import importlib.util
import pathlib
import runpy

from tda.run import defaults

SIZES = ("full", "small")
# The paper's other tasks: R of the queries is for facts alone.
TASKS = ("copa", "piqa", "arithmetic", "word_problems", "stories", "wrong")
FACTS = ("known_1000", "popqa")


def get_config(variant: str = "full"):
    """Returns the config of table 2, or of another set of queries on the same corpus."""
    is_size = variant in SIZES or "," in variant
    size, _, queries = (variant if is_size else f"full,{variant}").partition(",")
    if size not in SIZES or queries not in ("", *TASKS, *FACTS):
        raise ValueError(
            f"open_wiki.py:{variant}: give full or small after the colon, and after a comma one of "
            f"{', '.join((*TASKS, *FACTS))}"
        )
    c = defaults.get_config()
    has_dense = importlib.util.find_spec("sentence_transformers")
    dense = "dense," if has_dense else ""
    c.methods = (
        f"bm25,{dense}grad_dot,grad_cos,exp5,trackstar,rerank_exp5,rerank_trackstar,rerank_bm25,"
        "rrf,random"
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
        c.data.share = 0.02
        c.data.n_queries = 100
        c.tokenizer.vocab_size = 4096
        c.model.size = "tiny"
        c.train.epochs = 3.0
        c.train.learning_rate = 3e-3
        c.train.warmup = 50
        c.projection.side = 16
        c.rerank.passages = 30
        c.eval.tail_patch_queries = 30
        c.eval.sampled_queries = 10
    if queries:
        c.data.pool, c.data.exclude_relations = "all", ""
        c.data.n_queries = min(c.data.n_queries, 200)
        c.eval.sampled_queries = 0
    if queries in TASKS:
        c.methods = f"bm25,{dense}grad_dot,grad_cos,exp5,rerank_exp5,random"
        c.judge.name = ""
    if queries in ("piqa", "word_problems", "stories"):
        c.model.context = 384  # the longest are twice as long as the others' context
    return c
