"""The model's confidence in a fact: what share of its sampled answers state the target.

Sampled at temperature 1 (Chang et al. 2024 take 20 samples). The sequence so far is run anew for
every token, so that any model will do; samples of a query that agree so far are run once.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tda import loss as losses
from tda.data.batches import BatchLayout
from tda.evaluation.frequency import begins_with
from tda.runtime import progress, sharding

# Queries whose samples are drawn together.
_TOGETHER = 64


def sample(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    samples: int = 20,
    seed: int = 0,
    stop: int,
    layout: BatchLayout,
    on_done: Callable[[np.ndarray, list[list[list[int]]]], None] = lambda which, drawn: None,
) -> list[list[list[int]]]:
    """Continuations of each prompt, drawn from the model's own distribution.

    Args:
        model: maps tokens [B, T] to logits [B, T, V].
        prompts: token ids of each prompt, `<bos>` first.
        counts: tokens to draw after each prompt at most.
        samples: continuations of each prompt.
        seed: with the prompt's tokens, it decides the draws: they don't hang on the other prompts.
        stop: the token that ends a continuation; it is left out.
        layout: how sequences are batched; no sequence grows beyond its longest bucket.
        on_done: told, as the work goes on, which prompts are done and their continuations.

    Returns:
        For each prompt, `samples` lists of token ids.

    Raises:
        ValueError: a prompt is longer than the longest bucket.
    """
    longest = max(map(len, prompts), default=0)
    positions = layout.bucket_lengths[-1]
    if longest > positions:
        raise ValueError(f"a prompt has {longest} tokens, the model {positions} positions")
    next_token = _Next(model, layout)
    out: list = [None] * len(prompts)
    # Prompts that need as many tokens end together.
    order = np.argsort(np.asarray(counts), kind="stable")
    with progress.bar(len(prompts), "sample", "query") as bar:
        for start in range(0, len(order), _TOGETHER):
            batch = order[start : start + _TOGETHER]
            uniform = [_uniform(prompts[i], counts[i], samples, seed) for i in batch]
            drawn = _draw([list(prompts[i]) for i in batch], uniform, next_token, stop)
            for i, continuations in zip(batch, drawn, strict=True):
                out[i] = continuations
            on_done(batch, drawn)
            bar.update(len(batch))
    return out


def _uniform(prompt: Sequence[int], count: int, samples: int, seed: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [samples, count]: each picks a token from its distribution."""
    digest = hashlib.sha256(f"{seed}|".encode() + np.asarray(prompt, np.int64).tobytes()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    # A column at a time: more tokens leave the first ones as they were.
    return rng.random((count, samples)).T


def _draw(prompts, uniform, next_token, stop: int) -> list[list[list[int]]]:
    """Continuations of a few prompts, a token of each in turn."""
    going = {(i, s) for i, u in enumerate(uniform) for s in range(len(u)) if u.shape[1]}
    drawn: list = [[[] for _ in u] for u in uniform]
    step = 0
    while going:
        # The samples that share a prefix share its distribution.
        sharing: dict[tuple, list] = {}
        for i, s in sorted(going):
            sharing.setdefault((i, *drawn[i][s]), []).append((i, s))
        prefixes = [prompts[i] + list(continuation) for i, *continuation in sharing]
        picks = [[uniform[i][s, step] for i, s in members] for members in sharing.values()]
        for members, tokens in zip(sharing.values(), next_token(prefixes, picks), strict=True):
            for (i, s), token in zip(members, tokens, strict=True):
                if token != stop:
                    drawn[i][s].append(token)
                full = len(prompts[i]) + len(drawn[i][s]) > next_token.longest
                if token == stop or full or step + 1 == uniform[i].shape[1]:
                    going.remove((i, s))
        step += 1
    return drawn


class _Next:
    """Draws the token after each of some sequences."""

    def __init__(self, model: nnx.Module, layout: BatchLayout):
        graphdef, self._state = nnx.split(model)
        self._layout, self.longest = layout, layout.bucket_lengths[-1]

        @jax.jit
        def probabilities(state, tokens_BxT, last_B):
            model = nnx.merge(graphdef, state)
            # Where the model allows it, logits are made of the last positions alone.
            has_head = losses.has_separate_head(model)
            x_BxTxN = model.hidden(tokens_BxT) if has_head else model(tokens_BxT)
            x_Bx1xN = jnp.take_along_axis(x_BxTxN, last_B[:, None, None], axis=1)
            logits_BxV = (model.logits(x_Bx1xN) if has_head else x_Bx1xN)[:, 0]
            return jax.nn.softmax(logits_BxV.astype(jnp.float32), axis=-1)

        self._probabilities = probabilities

    def __call__(self, prefixes: list[list[int]], picks: list[list[float]]) -> list[list[int]]:
        """The tokens that `picks`, numbers in [0, 1), choose after each prefix."""
        out: list = [None] * len(prefixes)
        bucket_lengths = self._layout.bucket_lengths
        bucket = np.searchsorted(bucket_lengths, [len(p) for p in prefixes])
        for b in np.unique(bucket):
            length = bucket_lengths[b]
            size = max(1, self._layout.tokens_per_batch // length)
            in_bucket = np.flatnonzero(bucket == b)
            for start in range(0, len(in_bucket), size):
                batch = in_bucket[start : start + size]
                tokens_BxT = np.full((size, length), self._layout.pad, np.int32)
                last_B = np.zeros(size, np.int32)
                for row, i in enumerate(batch):
                    tokens_BxT[row, : len(prefixes[i])] = prefixes[i]
                    last_B[row] = len(prefixes[i]) - 1
                p_BxV = sharding.to_host(self._probabilities(self._state, tokens_BxT, last_B))
                for row, i in enumerate(batch):
                    out[i] = _pick(p_BxV[row], picks[i])
        return out


def _pick(p_V: np.ndarray, uniform: Sequence[float]) -> list[int]:
    """The tokens whose stretch of [0, 1), laid out by probability, holds each number."""
    reached = np.cumsum(p_V, dtype=np.float64)
    # Their sum is 1 but for rounding; a token of no probability has no stretch and is never drawn.
    at = np.searchsorted(reached, np.asarray(uniform) * reached[-1], side="right")
    return np.minimum(at, len(p_V) - 1).tolist()


def confidence(generations: Sequence[str], answers: Iterable[str]) -> float:
    """Share of the generations that begin with one of the answers, as whole words.

    Args:
        generations: what the model said after the prompt.
        answers: the target and its aliases; see `tda.evaluation.frequency` on case.

    Raises:
        ValueError: there are no generations.
    """
    if not generations:
        raise ValueError("no generations: the confidence is a share of them")
    answers = list(answers)
    return float(np.mean([begins_with(text, answers) for text in generations]))
