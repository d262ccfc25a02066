"""A byte-level BPE tokenizer: trained on the corpus, one JSON file beside the checkpoint."""

import os
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tda.data.joining import choose_joiner, join
from tda.data.pretrained_tokenizer import PretrainedTokenizer
from tda.runtime import atomic_file
from tda.runtime.fingerprint import fingerprint_parts

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class Tokenizer(PretrainedTokenizer):
    """A tokenizer of whole sequences.

    A sequence is `<bos> text <eos>`; `<pad>` never carries a loss. Every text gets a space in
    front, so that a name has the same tokens at the start of a sentence and inside one. A special
    token spelled out in a text is split into ordinary bytes and never read as the token.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        self.bos = inner.token_to_id(BOS)
        eos, pad = inner.token_to_id(EOS), inner.token_to_id(PAD)
        super().__init__(inner, begin=[self.bos], end=[eos], eos=eos, pad=pad)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a tokenizer of at most `vocab_size` tokens on `texts`.

        Raises:
            ValueError: `vocab_size` is too small for the 256 bytes and the special tokens.
        """
        specials = [PAD, BOS, EOS]
        if vocab_size < 256 + len(specials):
            raise ValueError(
                f"vocab_size={vocab_size} is below {256 + len(specials)} "
                "(256 bytes and the special tokens)"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Reads a tokenizer that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a tokenizer, or lacks the special tokens.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            inner = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        missing = [t for t in (PAD, BOS, EOS) if inner.token_to_id(t) is None]
        if missing:
            raise ValueError(f"{path} lacks the special tokens {', '.join(missing)}")
        return cls(inner)

    def save(self, path) -> None:
        """Writes the tokenizer to `path` as JSON, atomically."""
        with atomic_file.replacing(path) as part:
            self._inner.save(str(part))

    def fingerprint(self) -> str:
        """Returns a hash of all settings that decide a text's ids."""
        return fingerprint_parts([self._inner.to_str()])

    def encode_query(
        self, prompt: str, target: str, joiner: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Does what `PretrainedTokenizer.encode_query` does, with `<bos>` before the prompt.

        By default a space where one belongs also replaces white space at the border.
        """
        if joiner is None:
            has_space = prompt[-1:].isspace() or target[:1].isspace()
            prompt, target = prompt.rstrip(), target.strip()
            joiner = " " if prompt and has_space else choose_joiner(prompt, target)
        text = join(prompt, target, joiner)
        encoded = self._inner.encode(text, add_special_tokens=False)
        # The joiner's words are the prompt's. White space of its own that is no part of the prompt
        # is the target's.
        border = max(len(prompt), len(text[: len(text) - len(target)].rstrip()))
        # Offsets count the characters of `text`, not the space that the tokenizer puts in front.
        is_target = [bool(target.strip()) and end > border for _, end in encoded.offsets]
        if not any(is_target):
            raise ValueError(
                f"the target {target!r} of the prompt {prompt!r} has no token of its own; give "
                "more than white space"
            )
        ids = np.asarray([self.bos, *encoded.ids], np.int32)
        return ids, np.asarray([False, *is_target])
