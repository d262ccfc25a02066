"""The tokenizer of a run that learns its own, from the text that the model is trained on."""

import pathlib
from collections.abc import Callable, Iterable

from tda.data.tokenizer import Tokenizer
from tda.run.workdir import Workdir
from tda.runtime import preemption, processes


def load(config, workdir: Workdir, identity: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Learns the tokenizer, or finds it learnt.

    Args:
        config: the config.
        workdir: where it is kept.
        identity: tells the texts from others.
        texts: returns them.

    Raises:
        tda.run.workdir.WorkdirError: another tokenizer was learnt in the workdir.
    """
    size = config.tokenizer.vocab_size
    made_from = {"texts": identity, "vocab_size": size}
    if not workdir.finished("tokenizer", made_from):
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
