"""The model's confidence in a fact: the share of its sampled answers that state the target.

Answers are sampled at temperature 1 (Chang et al. 2024 take 20 samples). The model runs over the
whole sequence again for every token, so that any model can be sampled; samples of a query with the
same tokens so far share a run.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.data.batches import BatchLayout
from tda.facts.names import begins_with
from tda.runtime import progress, sharding
from tda.runtime.fingerprint import seed_of

# Queries whose samples are drawn together.
_TOGETHER = 64
# Continuations of some prompts: for each prompt, a list of token ids for each sample.
Drawn = list[list[list[int]]]


class Sampler:
    """Draws continuations of prompts from a model's own distribution.

    Args:
        model: maps tokens [B, T] to logits [B, T, V].
        stop: the token that ends a continuation; it is left out.
        layout: how sequences are batched; no sequence grows beyond its longest bucket.
    """

    def __init__(self, model: nnx.Module, stop: int, layout: BatchLayout):
        graphdef, self._state = nnx.split(model)
        self._stop, self._layout, self._longest = stop, layout, layout.bucket_lengths[-1]

        @jax.jit
        def probabilities(state, tokens_BxT, last_B):
            model = nnx.merge(graphdef, state)
            # If the model allows it, only the last positions' logits are computed.
            has_head = losses.has_separate_head(model)
            x_BxTxN = model.hidden(tokens_BxT) if has_head else model(tokens_BxT)
            x_Bx1xN = jnp.take_along_axis(x_BxTxN, last_B[:, None, None], axis=1)
            logits_BxV = (model.logits(x_Bx1xN) if has_head else x_Bx1xN)[:, 0]
            # In float32: bfloat16 would round most of the small probabilities to a few values.
            return jax.nn.softmax(logits_BxV.astype(jnp.float32), axis=-1)

        self._probabilities = probabilities

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        samples: int = 20,
        seed: int = 0,
        on_done: Callable[[np.ndarray, Drawn], None] = lambda which, drawn: None,
    ) -> Drawn:
        """Draws continuations of each prompt.

        Args:
            prompts: token ids of each prompt, `<bos>` first.
            counts: the most tokens to draw after each prompt.
            samples: continuations of each prompt.
            seed: seed of the draws, which depend on a prompt's tokens too, not on other prompts.
            on_done: called with the numbers of finished prompts and their continuations.
        """
        out: list = [None] * len(prompts)
        # Prompts of equal counts are drawn together, so that they end together.
        order = np.argsort(np.asarray(counts), kind="stable")
        with progress.bar(len(prompts), "sample", "query") as bar:
            for start in range(0, len(order), _TOGETHER):
                batch = order[start : start + _TOGETHER]
                uniform = [_uniform(prompts[i], counts[i], samples, seed) for i in batch]
                drawn = self._draw([list(prompts[i]) for i in batch], uniform)
                for i, continuations in zip(batch, drawn, strict=True):
                    out[i] = continuations
                on_done(batch, drawn)
                bar.update(len(batch))
        return out

    def _draw(self, prompts: list[list[int]], uniform: list[np.ndarray]) -> Drawn:
        """Draws continuations of a few prompts, one token of each at a time."""
        unfinished = {(i, s) for i, u in enumerate(uniform) for s in range(len(u)) if u.shape[1]}
        drawn: Drawn = [[[] for _ in u] for u in uniform]
        step = 0
        while unfinished:
            # The samples that share a prefix share its distribution.
            sharing: dict[tuple, list] = {}
            for i, s in sorted(unfinished):
                sharing.setdefault((i, *drawn[i][s]), []).append((i, s))
            prefixes = [prompts[i] + list(continuation) for i, *continuation in sharing]
            picks = [[uniform[i][s, step] for i, s in members] for members in sharing.values()]
            tokens_of = self._next_tokens(prefixes, picks)
            for members, tokens in zip(sharing.values(), tokens_of, strict=True):
                for (i, s), token in zip(members, tokens, strict=True):
                    if token != self._stop:
                        drawn[i][s].append(token)
                    full = len(prompts[i]) + len(drawn[i][s]) > self._longest
                    if token == self._stop or full or step + 1 == uniform[i].shape[1]:
                        unfinished.remove((i, s))
            step += 1
        return drawn

    def _next_tokens(self, prefixes: list[list[int]], picks: list[list[float]]) -> list[list[int]]:
        """Returns the tokens after each prefix that `picks`, numbers in [0, 1), select."""
        out: list = [None] * len(prefixes)
        bucket = np.searchsorted(self._layout.bucket_lengths, [len(p) for p in prefixes])
        for b in np.unique(bucket):
            length = self._layout.bucket_lengths[b]
            size = max(1, self._layout.tokens_per_batch // length)
            in_bucket = np.flatnonzero(bucket == b)
            for start in range(0, len(in_bucket), size):
                batch = in_bucket[start : start + size]
                # A batch that is not full is padded, so that a length has one compiled shape.
                tokens_BxT = np.full((size, length), self._layout.pad, np.int32)
                last_B = np.zeros(size, np.int32)
                for row, i in enumerate(batch):
                    tokens_BxT[row, : len(prefixes[i])] = prefixes[i]
                    last_B[row] = len(prefixes[i]) - 1
                p_BxV = sharding.to_host(self._probabilities(self._state, tokens_BxT, last_B))
                for row, i in enumerate(batch):
                    out[i] = _pick(p_BxV[row], picks[i])
        return out


def _uniform(prompt: Sequence[int], count: int, samples: int, seed: int) -> np.ndarray:
    """Draws numbers in [0, 1), float64 [samples, count]: each picks a token."""
    key = f"{seed}|".encode() + np.asarray(prompt, np.int64).tobytes()
    rng = np.random.default_rng(seed_of(key))
    # A column at a time, so that the first tokens do not depend on how many are drawn.
    return rng.random((count, samples)).T


def _pick(p_V: np.ndarray, uniform: Sequence[float]) -> list[int]:
    """Returns the tokens that numbers in [0, 1) select by the cumulative probabilities."""
    reached = np.cumsum(p_V, dtype=np.float64)
    # Scaled by the sum, which is 1 only up to rounding; a token of probability 0 is never selected.
    at = np.searchsorted(reached, np.asarray(uniform) * reached[-1], side="right")
    return np.minimum(at, len(p_V) - 1).tolist()


def confidence(generations: Sequence[str], answers: Iterable[str]) -> float:
    """Returns the share of the generations that begin with one of the answers, as whole words.

    The answers are the target and its aliases; see `tda.facts.names` on case.
    """
    answers = list(answers)
    return float(np.mean([begins_with(text, answers) for text in generations]))
