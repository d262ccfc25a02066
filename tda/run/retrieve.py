"""The stage that retrieves passages for every query by every method."""

import math
import pathlib

import numpy as np

from tda import hessian, methods
from tda import store as stores
from tda.gradients import adam_steps
from tda.gradients.factors import check_sites
from tda.methods import GradientKind, Method
from tda.retrieval import dense, ranked
from tda.retrieval.hessian_settings import HessianSettings
from tda.retrieval.ranked import Ranked
from tda.retrieval.whitening import describe_regularisation
from tda.run import encode, first_stage, index, second_stage
from tda.run.gradient_retrievers import NO_MIXTURE
from tda.run.registry import retriever_of
from tda.run.retrievers import Result, Retriever, queries_of_run
from tda.run.run import Run
from tda.runtime import processes
from tda.runtime.atomic_file import read_json, write_json


def retrieve(run: Run) -> tuple[dict[str, Ranked], dict]:
    """Returns rankings and notes (λ and the like) by method, for every method of the config.

    A ranking on disk from the same gradients and settings is reused. All processes encode and
    search gradients; process 0 alone runs the other retrievers.
    """
    chosen = methods.parse(run.config.methods)
    check(run.config, chosen)
    retrievers: dict[str, Retriever] = {}
    for method in chosen.values():
        if method.searched_by not in retrievers:
            retrievers[method.searched_by] = retriever_of(method)(run)
    # A ranking's name holds all that it depends on: a file that exists is up to date.
    (run.workdir / "retrieval").mkdir(exist_ok=True)
    files = {n: _file(run, retrievers[m.searched_by], m) for n, m in chosen.items()}
    lacking = processes.on_first_process(
        "look for rankings", lambda: [n for n, f in files.items() if not f.exists()]
    )
    # Methods that differ only in their title share a file, and are searched once.
    first = {files[n]: n for n in reversed(lacking)}
    todo = {n: chosen[n] for n in chosen if n in first.values()}
    candidates = first_stage.first_stage(run, todo)
    if candidates is not None:
        todo = _take_first_stage(run, candidates, todo, retrievers, files)
    kinds = [m.gradients for m in todo.values() if m.takes_gradients]
    encode.print_coverage(run, kinds)
    encode.encode_together(run, kinds)
    for kind in (GradientKind(), GradientKind(corrected=True)):
        # A store that lost a shard is completed even if no method has to search it.
        if _is_begun(run, kind):
            encode.encode(run, kind)
    # Each group is searched and released before the next: R of one kind is in memory at a time.
    groups = _groups(todo, retrievers)
    for i, group in enumerate(groups):
        retriever = retrievers[next(iter(group.values())).searched_by]
        later = [m for other in groups[i + 1 :] for m in other.values()]
        retriever.prepare(group, later)
        _search(run, retriever, group, files)
        retriever.release(group)
    notes = processes.on_first_process("read notes", lambda: _notes(files))
    return {n: ranked.load(files[n]) for n in chosen}, notes


def _take_first_stage(
    run: Run,
    candidates: Run,
    todo: dict[str, Method],
    retrievers: dict[str, Retriever],
    files: dict[str, pathlib.Path],
) -> dict[str, Method]:
    """Finds candidates, whose rankings begin with those of the same methods for the table.

    Returns:
        The methods that are still to be searched.
    """
    rankings, notes = retrieve(candidates)
    finders = {m: n for n, m in methods.parse(candidates.config.methods).items()}
    found = {
        n: finders[m]
        for n, m in todo.items()
        if m in finders and retrievers[m.searched_by].same_for_every_k
    }

    def write() -> None:
        for name, finder in found.items():
            if not files[name].exists():
                best = ranked.shorten(rankings[finder], run.config.eval.top_k)
                _write(files[name], Result(best, notes.get(finder, {})))

    with run.engine.alone():
        processes.on_first_process("shorten rankings", write)
    return {n: m for n, m in todo.items() if n not in found}


def _search(
    run: Run, retriever: Retriever, group: dict[str, Method], files: dict[str, pathlib.Path]
) -> None:
    """Ranks by the methods of a group, and writes their rankings."""

    def search() -> dict[str, Result]:
        return retriever.search(queries_of_run(run), group, run.config.eval.top_k)

    shared = search() if retriever.shares_search else None

    def write() -> None:
        if run.engine.party and all(files[name].exists() for name in group):
            return
        for name, result in (search() if shared is None else shared).items():
            _write(files[name], result)
        # Only unfinished rankings need them.
        if not run.engine.has_readers:
            run.remove_groups()

    with run.engine.alone():
        processes.on_first_process("search", write)


def check(config, chosen: dict[str, Method]) -> None:
    """Checks that the config fits its methods.

    Raises:
        ValueError: a key does not fit, or a method needs an extra that is not installed; the
            message names the key or the extra.
    """
    if first := first_stage.first_methods(config, chosen):
        check(config, first)
    for method in chosen.values():
        retriever_of(method)
        if method.retriever == "rerank":
            second_stage.check(config, method)
        if method.searched_by == "sums" and method.hessian == "mixed":
            raise ValueError(f"{method.title}: {NO_MIXTURE}")
        if method.hessian == "mixed":
            evaluation = HessianSettings(**dict(config.hessian)).evaluation_of(method)
            if evaluation == "leave_one_out" and config.search.index != "none":
                raise ValueError(
                    f"{method.title}: with R_eval leave_one_out a passage's norm depends on the "
                    "query, and an index holds one; use hessian.evaluation=disjoint or all, or "
                    "search.index=none"
                )
        if method.steps_by_adam and config.train.optimizer not in adam_steps.OPTIMIZERS:
            raise ValueError(
                f"{method.title} steps by Adam, whose moments train.optimizer="
                f"{config.train.optimizer} does not keep; leave it out of methods, or train by adam"
            )
        if method.retriever == "dense":
            if not config.dense.model:
                raise ValueError(
                    "the method dense needs --config.dense.model: the directory of a "
                    "sentence-transformers model, or its name on the hub"
                )
            dense.check(config.dense.model)


def check_run(run: Run) -> None:
    """Checks, before training, that model and queries suffice for the methods' gradients and R.

    Args:
        run: the run; its model may have shapes but no values.

    Raises:
        ValueError: no parameter matches, there are too few layers for the blocks, too few queries
            for R_eval, too little memory for an index, or no block whose R could be a Kronecker
            product.
    """
    queries = len(run.corpus.queries)
    chosen = methods.parse(run.config.methods)
    for method in first_stage.with_first(run.config, chosen).values():
        if method.retriever == "rerank":
            check_sites(run.sites(method.gradients))
        if not method.takes_gradients:
            continue
        shapes = run.block_shapes(method.gradients)
        if method.shares_scan:
            index.choose(run.config, run.corpus.rows, sum(map(math.prod, shapes)))
        if method.hessian != "none":
            shapes = run.hessian.shapes_of(shapes, run.corpus.rows)
        if method.hessian != "mixed":
            continue
        evaluation = run.hessian.evaluation_of(method)
        if evaluation != "all" and queries < 2:
            raise ValueError(
                f"{method.title}: R_eval {evaluation} takes other queries than the scored one, and "
                "there is one query; ask more, or use hessian.evaluation=all"
            )
        if run.config.hessian.weight < 0:
            count = queries // 2 if evaluation == "disjoint" else queries
            if evaluation == "leave_one_out" and any(len(shape) == 2 for shape in shapes):
                count = queries - 1
            widths = list(map(math.prod, shapes))
            # A dense block of R_eval has at most as many directions as there are queries; the
            # factors of a Kronecker product may have full rank already with one query.
            spectra = [
                (np.arange(width) < (count if len(shape) == 1 else width)).astype(np.float64)
                for width, shape in zip(widths, shapes, strict=True)
            ]
            k = run.config.hessian.component or hessian.default_component(sum(widths))
            hessian.check_component(spectra, k, count)


def _groups(todo: dict[str, Method], retrievers: dict[str, Retriever]) -> list[dict[str, Method]]:
    """Returns the methods in groups that are searched together."""
    kinds = dict.fromkeys(m.gradients for m in todo.values() if m.shares_scan)
    # The kinds that most methods use come first, so that a killed run has most of the table.
    usual = [k for k in (GradientKind(), GradientKind(corrected=True)) if k in kinds]
    shared = [
        {n: m for n, m in todo.items() if m.shares_scan and m.gradients == kind}
        for kind in dict.fromkeys([*usual, *kinds])
    ]
    alone, together = [], {}
    for name, method in todo.items():
        if method.shares_scan:
            continue
        if retrievers[method.searched_by].searches_together:
            together.setdefault(method.searched_by, {})[name] = method
        else:
            alone.append({name: method})
    return [*shared, *alone, *together.values()]


def _is_begun(run: Run, kind: GradientKind) -> bool:
    path = run.store_path("corpus", kind)
    return processes.on_first_process(
        "look for an unfinished store", lambda: stores.exists(path) and not stores.finished(path)
    )


def _file(run: Run, retriever: Retriever, method: Method) -> pathlib.Path:
    """Returns the file of a method's ranking, named by all that the ranking depends on."""
    return run.workdir / "retrieval" / f"{retriever.ranking_name(method)}.npz"


def _notes(files: dict[str, pathlib.Path]) -> dict:
    notes = {n: f.with_suffix(".json") for n, f in files.items()}
    return {n: read_json(f) for n, f in notes.items() if f.exists()}


def _write(file: pathlib.Path, result: Result) -> None:
    # The note first: a ranking that exists has its note, wherever a kill comes.
    if result.note:
        write_json(file.with_suffix(".json"), result.note)
    ranked.save(file, result.ranked)


_EVALUATIONS = {
    "all": "all queries",
    "leave_one_out": "all but the query",
    "disjoint": "the half without the query",
}


def describe(note: dict) -> str:
    """Returns a note of `retrieve` as a line of text."""
    parts = []
    if "lambda" in note:
        parts.append(f"λ = {note['lambda']:.3f} at component {note['component']}")
        parts.append(f"R_eval of {_EVALUATIONS[note['evaluation']]}")
    if "damping" in note or "shrinkage" in note:
        parts.append(describe_regularisation(note))
    if "weights" in note:
        pairs = zip(note["checkpoints"], note["weights"], strict=True)
        parts.append("checkpoints " + ", ".join(f"{s} ({w:.2f})" for s, w in pairs))
    elif "checkpoints" in note:  # of captured gradients, which have a weight each
        parts.append(f"checkpoints {', '.join(map(str, note['checkpoints']))}")
    return "; ".join(parts)
