"""Metagradients: the derivative of a query's loss after a training by the weights of its data.

Exact, by reverse mode through all steps (MAGIC, 2504.16430; REPLAY, 2503.13751), or along one
direction of the weights by forward mode. The first-order prediction of a removal is minus the sum
of the derivatives, so −dL/dw is a score that is positive for what lowers the loss.

The cotangent of the state (parameters and moments) goes backwards through the steps. States are
saved at every √T-th step of the forward pass and computed again in between, which takes one more
training. The cotangents of all queries pass a step together, and are saved at the same steps, so
that a killed pass resumes from there.
"""

import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tda.counterfactual.training import QueryLosses, State, Training, with_plain_attention
from tda.runtime import preemption, progress, sharding
from tda.runtime.atomic_file import read_arrays, write_arrays


class SecondDerivativeError(RuntimeError):
    """The installed jax computes batched second derivatives wrongly."""


def split_state(state: State) -> tuple[list, list]:
    """Returns the leaves of a state that are floats, and the others (counts of steps)."""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if _is_float(x)], [x for x in leaves if not _is_float(x)]


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _join_state(like: State, floats: list, counts: list) -> State:
    leaves, treedef = jax.tree.flatten(like)
    sources = iter(floats), iter(counts)
    return jax.tree.unflatten(treedef, [next(sources[not _is_float(x)]) for x in leaves])


class Reverse:
    """Reverse mode through a training.

    Args:
        training: the training.
        queries: the queries.
        directory: the directory of states and of an unfinished pass.
        at_once: queries whose cotangents pass a step as one batch. More than 1 needs a jax whose
            batched second derivatives are right; 1 takes them one after another.

    Raises:
        SecondDerivativeError: `at_once` is above 1 and the installed jax fails the check.
    """

    def __init__(
        self, training: Training, queries: QueryLosses, directory: pathlib.Path, at_once: int = 1
    ):
        if at_once > 1:
            check_batched_second_derivatives()
        self.training, self.queries, self.directory = training, queries, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.stride = max(1, math.isqrt(training.steps))

        def pull(state, batch, weights_BxT, cotangents):
            floats, counts = split_state(state)

            def step(floats, weights_BxT):
                before = _join_state(state, floats, counts)
                return split_state(training.step(before, batch, weights_BxT))[0]

            pullback = jax.vjp(step, floats, weights_BxT)[1]
            # One after another by default: `lax.map` shares the pullback's forward values.
            return jax.lax.map(pullback, cotangents, batch_size=at_once if at_once > 1 else None)

        self._pull = jax.jit(pull, donate_argnums=3)

    def keep_states(self) -> None:
        """Trains on from the last saved state, and saves the state at every √T-th step."""
        steps = self.training.steps
        saved = [*range(0, steps, self.stride), steps]
        done = next(
            (i for i, step in enumerate(saved) if not self._state_path(step).exists()), None
        )
        if done is None:
            return
        first = saved[done - 1] if done else 0
        state = self._read(first) if done else None
        with progress.bar(steps, "train, keeping states", "step", first, saves_work=True) as bar:

            def on_step(step, state):
                self._keep(step, state)
                bar.update(step - bar.n)

            self._keep(steps, self.training.run(state=state, first=first, on_step=on_step))
            bar.update(steps - bar.n)

    def final_state(self) -> State:
        """Returns the state at the end of the training."""
        return self.state_at(self.training.steps)

    def state_at(self, step: int) -> State:
        """Returns the state after some steps, a multiple of the stride or all of them."""
        self.keep_states()
        return self._read(step)

    def segment(self, stop: int) -> list[State]:
        """Returns the states before each step from the last saved one to `stop`."""
        first = (stop - 1) // self.stride * self.stride
        states: list[State] = []
        self.training.run(
            state=self._read(first),
            first=first,
            stop=stop,
            # A copy: the next step reuses the buffers.
            on_step=lambda i, s: states.append(jax.tree.map(jnp.copy, s)),
        )
        return states

    def backwards(self) -> Iterator[tuple[int, State, State]]:
        """Yields the steps from the last to the first, each with the states before and after it."""
        step, after = self.training.steps, self.final_state()
        while step:
            for state in reversed(self.segment(step)):
                step -= 1
                yield step, state, after
                after = state

    def by_token(self, numbers: np.ndarray, name: str = "queries") -> np.ndarray:
        """Returns −dL/dw of some queries by every token of the table, float32 [Q, C].

        Sums over a passage's tokens are its own scores (`tda.counterfactual.training.sum_by_unit`).

        Args:
            numbers: the queries.
            name: names the file of an unfinished pass; one name for each set of queries.

        Raises:
            FloatingPointError: a derivative is not finite.
        """
        self.keep_states()
        training = self.training
        step, cotangents, scores_QxC = self._resume(name, numbers)
        done = training.steps - step
        with progress.bar(
            training.steps, f"metagradients ({name})", "step", done, saves_work=True
        ) as bar:
            while step:
                for state in reversed(self.segment(step)):
                    step -= 1
                    batch = training.batches[step]
                    weights_BxT = batch.spread(training.even_weights)
                    cotangents, d_QxBxT = self._pull(state, batch.arrays, weights_BxT, cotangents)
                    batch.add_to(scores_QxC, -sharding.to_host(d_QxBxT))
                    bar.update(1)
                if not np.isfinite(scores_QxC).all():
                    raise FloatingPointError(
                        f"the derivatives of the training from step {step} on are not finite: "
                        "where a gradient vanishes, √ν has none unless eps_root is above 0 (1e-8); "
                        "if it is, the training diverges: lower the learning rate"
                    )
                self._save_pass(name, step, cotangents, scores_QxC)
                preemption.check()
        return scores_QxC

    def _resume(self, name: str, numbers: np.ndarray) -> tuple[int, list, np.ndarray]:
        """Returns step, cotangents and scores of an unfinished pass, or of one that begins."""
        path = self._pass_path(name)
        if path.exists():
            arrays = read_arrays(path)
            floats = [jnp.asarray(arrays[f"leaf{i}"]) for i in range(len(arrays) - 2)]
            return int(arrays["step"]), floats, arrays["scores"]
        final = self._read(self.training.steps)
        by_path = self.queries.all_gradients(final["params"])
        leaves = [x[np.asarray(numbers)] for x in by_path.values()]
        gradients = jax.tree.unflatten(jax.tree.structure(final["params"]), leaves)
        # A query's loss does not depend on the final moments.
        zeros = jax.tree.map(
            lambda x: jnp.zeros((len(numbers), *x.shape), x.dtype) if _is_float(x) else x, final
        )
        cotangents = split_state(zeros | {"params": gradients})[0]
        scores_QxC = np.zeros((len(numbers), len(self.training.table.tokens)), np.float32)
        return self.training.steps, cotangents, scores_QxC

    def _pass_path(self, name: str) -> pathlib.Path:
        return self.directory / f"pass-{name}.npz"

    def _save_pass(self, name: str, step: int, cotangents: list, scores_QxC: np.ndarray) -> None:
        leaves = {f"leaf{i}": sharding.to_host(x) for i, x in enumerate(cotangents)}
        arrays = leaves | {"step": np.int64(step), "scores": scores_QxC}
        write_arrays(self._pass_path(name), arrays)

    def forget_pass(self, name: str) -> None:
        """Removes the file of a pass whose scores are saved elsewhere."""
        self._pass_path(name).unlink(missing_ok=True)

    def _state_path(self, step: int) -> pathlib.Path:
        return self.directory / f"state-{step:06d}.npz"

    def _keep(self, step: int, state: State) -> None:
        path = self._state_path(step)
        if (step % self.stride and step < self.training.steps) or path.exists():
            return
        leaves = jax.tree.leaves(state)
        write_arrays(path, {f"leaf{i}": sharding.to_host(x) for i, x in enumerate(leaves)})

    def _read(self, step: int) -> State:
        arrays = read_arrays(self._state_path(step))
        treedef = jax.tree.structure(jax.eval_shape(self.training.start))
        return jax.tree.unflatten(
            treedef, [jnp.array(arrays[f"leaf{i}"]) for i in range(len(arrays))]
        )


class Forward:
    """Forward mode through a training: the derivatives of all queries' losses along a direction.

    The derivatives are computed along with the training, so that no state is saved: about 2.3
    trainings for a direction, for any number of queries. An independent check of reverse mode.

    Args:
        training: the training.
        queries: the queries.

    Raises:
        TypeError: the model is no `Decoder`.
    """

    def __init__(self, training: Training, queries: QueryLosses):
        self.training, self.queries = training, queries
        model_fn = with_plain_attention(training.model_fn, training.params)

        def push(state, tangents, batch, weights_BxT, direction_BxT):
            floats, counts = split_state(state)

            def step(floats, weights_BxT):
                before = _join_state(state, floats, counts)
                return split_state(training.step(before, batch, weights_BxT, model_fn))

            floats, tangents, counts = jax.jvp(
                step, (floats, weights_BxT), (tangents, direction_BxT), has_aux=True
            )
            return _join_state(state, floats, counts), tangents

        def slopes(params, tangents, batch):
            def losses(params):
                return queries.of_batch(params, batch, model_fn)

            return jax.jvp(losses, (params,), (tangents,))[1]

        self._push = jax.jit(push, donate_argnums=(0, 1))
        self._slopes = jax.jit(slopes)

    def along(self, direction_C: np.ndarray) -> np.ndarray:
        """Returns dL/dw · direction for all queries, float32 [Q].

        Args:
            direction_C: a number for every token of the table.
        """
        training, queries = self.training, self.queries
        state = training.start()
        tangents = [jnp.zeros_like(x) for x in split_state(state)[0]]
        for batch in training.batches:
            weights, direction = batch.spread(training.even_weights), batch.spread(direction_C)
            state, tangents = self._push(state, tangents, batch.arrays, weights, direction)
        of_params = _join_state(state, tangents, split_state(state)[1])["params"]
        out = np.zeros(len(queries), np.float32)
        for query_batch in queries.batches:
            slopes_B = self._slopes(state["params"], of_params, query_batch.arrays())
            out[query_batch.places] = sharding.to_host(slopes_B)[: len(query_batch.places)]
        return out


@functools.cache
def check_batched_second_derivatives() -> None:
    """Checks, once in a process, that batched second derivatives equal those of single directions.

    jax 0.10.2 on CPUs is wrong for all directions but the first, by 3 to 90 %, if reverse over
    reverse mode goes through `lax.scan` and the batch is large enough.

    Raises:
        SecondDerivativeError: they differ.
    """
    rng = np.random.default_rng(0)
    # The smallest program with the error: batches of 8, two or three directions, or a mean of
    # squares, are right.
    x_BxTxD = jnp.asarray(rng.normal(size=(32, 40, 64)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2, 64, 64)) / 8, jnp.float32)

    def layer(x, kernel):
        size = jnp.sum(x * x, axis=-1, keepdims=True) / 64
        return x + jnp.tanh((x * size) @ kernel), None

    def product(direction):
        def loss(kernel):
            return jnp.mean(jax.lax.scan(layer, x_BxTxD, kernel)[0] ** 2)

        return jax.vjp(jax.grad(loss), kernel)[1](direction)[0]

    directions = jnp.asarray(rng.normal(size=(4, 2, 64, 64)), jnp.float32)
    together = jax.jit(jax.vmap(product))(directions)
    alone = jax.jit(product)(directions[1])
    error = float(jnp.abs(together[1] - alone).max() / jnp.abs(alone).max())
    if not error < 1e-4:
        raise SecondDerivativeError(
            f"jax {jax.__version__} computes batched second derivatives wrongly here (relative "
            f"error {error:.2g}); install another version, or take queries one at a time"
        )
