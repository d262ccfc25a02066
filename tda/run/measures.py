"""Measurements of the model by pair or by query, kept on disk and shared by methods.

A value's key is a digest of the tokens that it was computed from, and its file is named by the
checkpoint and the rule, so every method and every run on that checkpoint reuses it, for any subset
of the corpus or the queries.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from tda.data.batches import draw
from tda.data.tokens import TokenTable
from tda.evaluation import summary
from tda.evaluation.likelihood import Likelihood
from tda.evaluation.sampling import Sampler
from tda.evaluation.tail_patch import TailPatch
from tda.run import questions
from tda.run.result_log import ResultLog
from tda.run.run import Corpus, Run
from tda.run.train import learning_rates, make_optimizer, restore_state
from tda.runtime import processes, progress, sharding
from tda.runtime.fingerprint import fingerprint, fingerprint_parts

# The passage row of a step with a zero gradient.
CONTROL = -1
# Pairs whose tail-patches are one group: a minute of an 8B model's steps, which a kill may cost.
_PAIRS_PER_GROUP = 64
# Sequences whose likelihoods are written together.
_PRIORS_TOGETHER = 4096


# The tokens of a prompt, and those of a target.
_Parts = tuple[np.ndarray, np.ndarray]

_NO_STEP = (
    "a tail-patch step takes the learning rate of the traced checkpoint, and the schedule ends at "
    "0; give eval.tail_patch_learning_rate, or eval.tail_patch_queries=0"
)


def check(config) -> None:
    """Checks that a tail-patch step of the config is possible and changes something.

    Raises:
        ValueError: the model is not trained here, or the step's learning rate is 0.
    """
    e, t = config.eval, config.train
    if not e.tail_patch_queries:
        return
    if config.model.pretrained and not t.epochs:
        raise ValueError(
            "a tail-patch step needs the training optimizer, and this model is not trained here; "
            "give --config.eval.tail_patch_queries=0, or train it (train.epochs)"
        )
    ends_at_0 = t.schedule != "constant" and t.traced == 1 and t.final == 0
    if ends_at_0 and not e.tail_patch_learning_rate:
        raise ValueError(_NO_STEP)


def step_rule(run: Run) -> dict:
    """Describes a tail-patch step as JSON values that belong beside its scores.

    Raises:
        ValueError: the learning rate is 0 at the traced checkpoint.
    """
    e, t = run.config.eval, run.config.train
    rate = e.tail_patch_learning_rate or float(
        learning_rates(run.config, run.total_steps)(run.trained.step)
    )
    if not rate:
        raise ValueError(_NO_STEP)
    return {
        "batch": "one passage alone",
        "loss": "mean cross-entropy over its tokens",
        "optimizer": t.optimizer,
        "optimizer_state": e.tail_patch_state,
        "learning_rate": rate,
        "clip": t.clip,
        "checkpoint_step": run.trained.step,
    }


def tail_patches(
    run: Run, pairs: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], tuple[float, float]]:
    """Returns the target's log-probability in nats before and after one step, for every pair.

    Args:
        run: the run.
        pairs: (query row, passage row), or (query row, `CONTROL`). A pair that was measured before,
            by any run on this checkpoint, is read.
    """
    pairs = sorted(set(pairs))
    corpus, rule = run.corpus, step_rule(run)
    log = ResultLog(
        run.workdir / f"tail_patch-{fingerprint(run.checkpoint | {'rule': rule})}.jsonl"
    )
    have = log.read()
    # Keys are digests of tokens: passages of the same text are one passage.
    query_of = {q: _digest(corpus.prompts, q) for q in {q for q, _ in pairs}}
    passage_of = {p: _digest(corpus.passages, p) for p in {p for _, p in pairs}}
    keys = [f"{query_of[q]} {passage_of[p]}" for q, p in pairs]
    todo = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in have}
    if todo:
        _measure_patches(run, rule, todo, log)
        have = log.read()
    return {pair: tuple(have[key]) for pair, key in zip(pairs, keys, strict=True)}


def _measure_patches(
    run: Run, rule: dict, todo: dict[str, tuple[int, int]], log: ResultLog
) -> None:
    """Takes tail-patch steps in groups of pairs, and adds their results to the log.

    Raises:
        FloatingPointError: log p is not finite after a step; the message names passage and query.
    """
    passages = np.array([passage for _, passage in todo.values()], np.int64)
    lengths = np.where(passages < 0, 0, run.corpus.passages.lengths_of(np.maximum(passages, 0)))
    # By length, since a step is compiled for each padded length; then by passage, since all queries
    # of a passage share its step.
    order = sorted(zip(lengths.tolist(), passages.tolist(), todo, strict=True))
    keys = [key for _, _, key in order]
    pairs = [todo[key] for key in keys]
    steps = functools.cache(lambda: _tail_patch(run, rule))
    if jax.process_count() > 1:
        # Orbax restores a state in all processes at once, also in those that get no group.
        steps()
    # A model that is spread over processes takes every step in all of them.
    is_joint = not sharding.is_local(run.trained.mesh)
    with progress.bar(len(keys), "tail-patch", "pair", saves_work=True) as bar:

        def work(numbers: range) -> dict[str, np.ndarray]:
            group = pairs[numbers.start : numbers.stop]

            def check(which: np.ndarray, log_p: np.ndarray) -> None:
                # Not saved: a later run would read it as a measurement.
                bad = which[~np.isfinite(log_p).all(axis=1)]
                if len(bad):
                    query, passage = group[bad[0]]
                    raise FloatingPointError(
                        f"after a tail-patch step on {_name(run.corpus, passage)} the target of "
                        f"query {run.corpus.prompts.ids[query]!r} has no finite log p; lower "
                        f"eval.tail_patch_learning_rate (it is {rule['learning_rate']:.3g})"
                    )
                bar.update(len(which))
                # A group may take longer than the time between a notice and the kill.
                processes.check_preemption(is_joint)

            corpus = run.corpus
            return {"log_p": steps()(corpus.passages, corpus.prompts, group, on_done=check)}

        def keep(results: Iterator[dict[str, np.ndarray]]) -> None:
            log_p = np.concatenate([r["log_p"] for r in results])
            with run.engine.alone():
                have = log.read() if run.engine.party else {}
                pairs = zip(keys, log_p.tolist(), strict=True)
                log.add([(key, value) for key, value in pairs if key not in have])

        groups = dataclasses.replace(run.groups, is_joint=is_joint)
        ranges = [
            range(i, min(len(keys), i + _PAIRS_PER_GROUP))
            for i in range(0, len(keys), _PAIRS_PER_GROUP)
        ]
        groups.reduce(
            f"tail-patch-{fingerprint([log.path.name, keys])}", ranges, work, keep, bar.update
        )
    if not run.engine.has_readers:
        processes.on_first_process("remove groups", run.remove_groups)


def _tail_patch(run: Run, rule: dict) -> TailPatch:
    # The optimizer's state is several times the model: restored only if a step is taken.
    model_fn, state = restore_state(run.trained)
    tx = make_optimizer(run.config, run.total_steps, rule["learning_rate"])
    if rule["optimizer_state"] == "fresh":
        state = state | {"opt_state": _fresh(tx, state)}
    return TailPatch(model_fn, state, tx, run.unsharded_layout)


def likelihoods(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns −log p(target | prompt) in nats, float32 [Q], and the targets' ranks, int64 [Q]."""
    prompts = run.corpus.prompts
    log = ResultLog(run.workdir / f"likelihood-{fingerprint(run.checkpoint)}.jsonl")
    keys = [_digest(prompts, q) for q in range(len(prompts))]
    with run.engine.alone():
        measured = log.read()
        rows = np.array([q for q, key in enumerate(keys) if key not in measured], np.int64)
        if len(rows):
            targets = Likelihood(run.trained.model, run.unsharded_layout)(prompts, rows)
            pairs = zip(targets.nats.tolist(), targets.ranks.tolist(), strict=True)
            done = {keys[q]: pair for q, pair in zip(rows, pairs, strict=True)}
            measured |= done
            log.add(done.items())
    nats, ranks = zip(*(measured[key] for key in keys), strict=True)
    return np.array(nats, np.float32), np.array(ranks, np.int64)


def priors(run: Run, queries: Sequence[int]) -> dict[int, float]:
    """Returns how likely each query's target is after prompts about other subjects.

    By query row the mean of −log p(target | prompt) in nats, over at most `eval.prior_prompts` of
    the run's prompts of the same relation, drawn at random. A query without any is left out.
    """
    corpus, e = run.corpus, run.config.eval
    by_relation: dict[str, list[int]] = {}
    for q, fact in enumerate(corpus.queries):
        by_relation.setdefault(fact.relation, []).append(q)
    parts: dict[int, list[_Parts]] = {}
    for q in queries if e.prior_prompts else ():
        fact = corpus.queries[q]
        about_others = [
            other
            for other in (by_relation[fact.relation] if fact.relation else ())
            if corpus.queries[other].entity0 != fact.entity0
            and len(_parts(corpus.prompts, other)[0]) + len(_parts(corpus.prompts, q)[1])
            <= run.config.model.context
        ]
        drawn = draw(len(about_others), e.prior_prompts, e.seed)
        for other in (about_others[i] for i in drawn):
            pair = _parts(corpus.prompts, other)[0], _parts(corpus.prompts, q)[1]
            parts.setdefault(q, []).append(pair)
    return {q: float(np.mean(nats)) for q, nats in _nats(run, parts).items()}


def knowledge(run: Run, queries: np.ndarray) -> np.ndarray:
    """Returns what the model knows of each query: indices into `tda.evaluation.summary.KNOWLEDGE`.

    −1 where that is not measured (`eval.prior_prompts=0`).
    """
    return knowledge_by(*likelihoods(run), priors(run, queries.tolist()), queries)


def knowledge_by(
    nats_Q: np.ndarray, ranks_Q: np.ndarray, prior_of: dict[int, float], queries: np.ndarray
) -> np.ndarray:
    """Returns what `knowledge` does, by what `likelihoods` and `priors` returned."""
    if not prior_of:
        return np.full(len(queries), -1)
    beyond = [prior_of.get(q, np.nan) - nats_Q[q] for q in queries.tolist()]
    return summary.knowledge(ranks_Q[queries] == 1, np.array(beyond))


def other_choices(run: Run, queries: Sequence[int]) -> dict[int, list[float]]:
    """Returns how likely the choices beside a query's target are.

    By query row −log p(choice | prompt) in nats of each; a query without choices is left out.
    """
    facts = [run.corpus.queries[q] for q in queries]
    table = questions.tokenise_choices(facts, run.config, run.corpus.tokenizer)
    parts: dict[int, list[_Parts]] = {}
    query_of_choice = np.repeat(queries, [len(fact.other_choices) for fact in facts]).tolist()
    for row, q in enumerate(query_of_choice):
        parts.setdefault(q, []).append(_parts(table, row))
    return _nats(run, parts)


def _nats(run: Run, parts: dict[int, list[_Parts]]) -> dict[int, list[float]]:
    """Returns −log p of the second part after the first, in nats, by the key of each."""
    sequences, keys = {}, {}
    for q, of_query in parts.items():
        keys[q] = [f"{_hash(prompt)} {_hash(target)}" for prompt, target in of_query]
        sequences |= dict(zip(keys[q], of_query, strict=True))
    log = ResultLog(run.workdir / f"priors-{fingerprint(run.checkpoint)}.jsonl")
    with run.engine.alone():
        nats = log.read()
        todo = [key for key in sequences if key not in nats]
        # Without anything to do the model is not opened.
        statistics = Likelihood(run.trained.model, run.unsharded_layout) if todo else None
        for first in range(0, len(todo), _PRIORS_TOGETHER):
            group = todo[first : first + _PRIORS_TOGETHER]
            values = statistics(_table([sequences[key] for key in group])).nats.tolist()
            done = list(zip(group, values, strict=True))
            nats |= dict(done)
            log.add(done)
            processes.check_preemption(is_joint=True)
    return {q: [nats[key] for key in of_query] for q, of_query in keys.items()}


def _parts(table: TokenTable, row: int) -> _Parts:
    """Returns the tokens of a query's prompt, and those of its target."""
    tokens, scored = table.sequence(row)
    target = int(np.flatnonzero(scored)[0])
    return tokens[:target], tokens[target:]


def _table(parts: Sequence[_Parts]) -> TokenTable:
    """Returns sequences of prompts and targets, with the targets scored."""
    names = [str(i) for i in range(len(parts))]
    flat = [x for pair in parts for x in pair]
    lengths = np.array([len(x) for x in flat], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])[::2]
    scored = np.repeat(np.arange(len(flat)) % 2 == 1, lengths)
    return TokenTable(names, names, np.concatenate(flat), starts, scored)


def _fresh(tx, state: dict):
    """Returns an optimizer state as at the first step, laid out like the trained one."""
    # Initialised as one program, then laid out: parameters may be sharded.
    new = jax.jit(tx.init)(state["params"])
    return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), new, state["opt_state"])


def generations(run: Run, queries: Sequence[int]) -> dict[int, list[str]]:
    """Samples the model's answers to some queries' prompts; returns the texts by query row.

    Each answer has one token more than the longest answer (target or alias) of its query.
    """
    count, seed = run.config.eval.samples, run.config.eval.seed
    corpus, tokenizer, prompts = run.corpus, run.corpus.tokenizer, run.corpus.prompts
    provenance = run.checkpoint | {"samples": count, "seed": seed}
    log = ResultLog(run.workdir / f"generations-{fingerprint(provenance)}.jsonl")
    ids, lengths, keys = {}, {}, {}
    for q in queries:
        prompt, _ = _parts(prompts, q)
        ids[q] = prompt.tolist()
        encoded = tokenizer.encode(corpus.answers(q))
        lengths[q] = 1 + max(map(len, encoded))
        keys[q] = f"{_hash(prompt)} {lengths[q]}"
    with run.engine.alone():
        have = log.read()
        # Queries with the same prompt share their answers.
        todo = list({keys[q]: q for q in queries if keys[q] not in have}.values())

        def keep(which: np.ndarray, drawn: list) -> None:
            done = [
                (keys[todo[i]], [tokenizer.decode(s).strip() for s in answers])
                for i, answers in zip(which, drawn, strict=True)
            ]
            have.update(done)
            log.add(done)
            processes.check_preemption(is_joint=True)

        if todo:
            sampler = Sampler(run.trained.model, tokenizer.eos, run.unsharded_layout)
            sampler([ids[q] for q in todo], [lengths[q] for q in todo], count, seed, keep)
    return {q: have[keys[q]] for q in queries}


def _name(corpus: Corpus, passage: int) -> str:
    if passage == CONTROL:
        return "a zero gradient"
    return f"passage {corpus.passages.ids[passage]!r}"


def _digest(table: TokenTable, row: int) -> str:
    if row == CONTROL:
        return "control"
    return _hash(*table.sequence(row))


def _hash(*arrays: np.ndarray) -> str:
    # With dtypes: equal bytes of other dtypes are other arrays.
    return fingerprint_parts(part for x in arrays for part in (str(x.dtype), x))
