"""The tokenizer of a run that learns its own, from the text that the model is trained on."""

import pathlib
from collections.abc import Callable, Iterable

from tda.data.tokenizer import Tokenizer
from tda.run.workdir import Workdir
from tda.runtime import preemption, processes


def load(config, workdir: Workdir, identity: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Learns the tokenizer, or opens the one that was learnt before.

    Args:
        config: the config.
        workdir: the directory that keeps it.
        identity: a hash of the texts.
        texts: returns the texts.

    Raises:
        tda.run.workdir.WorkdirError: another tokenizer was learnt in the workdir.
    """
    size = config.tokenizer.vocab_size
    made_from = {"texts": identity, "vocab_size": size}
    if not workdir.is_finished("tokenizer", made_from):
        workdir.claim("tokenizer", made_from, config)

        def train():
            path = _path(workdir)
            path.parent.mkdir(exist_ok=True)
            preemption.heed(lambda: Tokenizer.train(texts(), size)).save(path)

        processes.on_first_process("train the tokenizer", train)
        workdir.finish("tokenizer")
    return open_learnt(workdir)


def open_learnt(workdir: Workdir | pathlib.Path) -> Tokenizer:
    """Returns the tokenizer that was learnt in a workdir."""
    return Tokenizer.load(_path(workdir))


def _path(workdir: Workdir | pathlib.Path) -> pathlib.Path:
    return workdir / "model" / "tokenizer.json"
