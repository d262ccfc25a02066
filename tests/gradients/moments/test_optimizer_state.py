"""Second moments found in any state, and the optimizers' own rules, against optax's updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tda.gradients.moments import optimizer_state, second_moments
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.model.functional import flat_parameters
from tda.training import checkpoint

# Square matrices, so that only the names tell them apart; a module and a layer are called as the
# state's fields are.
PARAMS = {
    "kernel": jnp.zeros((6, 6)),
    "nu": {"kernel": jnp.zeros((6, 6))},
    "v": {"kernel": jnp.zeros((6, 6))},
    "blocks": [{"kernel": jnp.zeros((6, 6))}, {"kernel": jnp.zeros((6, 6))}],
}
PATHS = sorted(flat_parameters(PARAMS))
EPS = {"eps": 0.03, "eps_root": 0.02}
ADAM = {"name": "adam", "b2": 0.9, **EPS}
ADAM_ARGUMENTS = {"optimizer": "adam", "b2": 0.9, **EPS}


def find(source, path, described):
    """The moments of one parameter in a state, or in the checkpoint at a path."""
    return optimizer_state.open_state(source, **described).moments([path])[path]


def gradients(step):
    """Entries of very different size, so that a transposed or exchanged scale stands out."""
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * np.exp(rng.normal(size=x.shape))), PARAMS
    )


def run(tx, steps=4):
    """The state after some steps, the last update and the gradient of the last step, by path."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(steps):
        g = gradients(step)
        updates, state = update(g, state, PARAMS)
    return state, flat_parameters(updates), flat_parameters(g)


def adam(b2=0.9, eps=0.03, eps_root=0.02):
    return optax.adam(0.5, b1=0.0, b2=b2, eps=eps, eps_root=eps_root)


def half(path_test):
    """A tree like the parameters with True where the test of the path's name holds."""
    return jax.tree_util.tree_map_with_path(
        lambda p, _: path_test("/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p)),
        PARAMS,
    )


BLOCKS = half(lambda name: name.startswith("blocks"))
REST = half(lambda name: not name.startswith("blocks"))
LABELS = jax.tree.map(lambda b: "nu" if b else "rest", BLOCKS)

NESTED = {
    "bare": optax.chain(optax.scale_by_adam(b1=0.0, b2=0.9, **EPS), optax.scale(-0.5)),
    "chain": optax.chain(optax.clip_by_global_norm(1e9), adam(), optax.add_decayed_weights(0.1)),
    "masked": optax.chain(optax.masked(adam(), BLOCKS), optax.masked(adam(), REST)),
    "partition": optax.partition({"nu": adam(), "rest": adam()}, LABELS),
    "multi_transform": optax.multi_transform({"nu": adam(), "rest": adam()}, LABELS),
    "injected": optax.inject_hyperparams(adam)(b2=0.9),
    "if_finite": optax.apply_if_finite(adam(), 3),
}


@pytest.mark.parametrize("name", NESTED)
def test_moments_are_found_wherever_they_are(name, tmp_path):
    """Guards: moments mapped to the wrong modules; a count of another transformation."""
    state, updates, g = run(NESTED[name])
    checkpoint.save(tmp_path, 1, {"params": PARAMS, "opt_state": state}, {})
    for source in (state, tmp_path):
        by_path = optimizer_state.open_state(source, **ADAM).moments(PATHS)
        for path, moments in by_path.items():
            expected = -0.5 * g[path] * optimizer_state.exact(moments)
            np.testing.assert_allclose(expected, updates[path], rtol=1e-5)
            assert moments.prefix.count("/mu/") == 0


def test_groups_and_parameters_in_another_order_keep_their_moments():
    """Guards: moments mapped to the wrong modules when groups are reordered."""
    swapped = jax.tree.map({"nu": "rest", "rest": "nu"}.get, LABELS)
    # A parameter more, before all others, moves every number by one.
    first = {"a": {"kernel": jnp.ones((6, 6))}}
    labels = {"a": {"kernel": "rest"}} | LABELS
    orders = [
        (NESTED["partition"], {}),
        (optax.partition({"rest": adam(), "nu": adam()}, swapped), {}),
        (optax.partition({"nu": adam(), "rest": adam()}, labels), first),
        (NESTED["masked"], {}),
        (optax.chain(optax.masked(adam(), REST), optax.masked(adam(), BLOCKS)), {}),
    ]
    for tx, more in orders:
        params, g = more | PARAMS, gradients(0)
        _, state = tx.update(more | g, tx.init(params), params)
        for path, x in flat_parameters(g).items():
            # The first step's ν, corrected for its bias, is the square of the gradient.
            scale = optimizer_state.exact(find(state, path, ADAM))
            np.testing.assert_allclose(scale, 1 / (np.sqrt(x**2 + 0.02) + 0.03), rtol=1e-5)


def test_only_what_is_needed_is_loaded(tmp_path):
    state, _, _ = run(NESTED["chain"], 1)
    checkpoint.save(tmp_path, 1, {"params": PARAMS, "opt_state": state}, {})
    opened = optimizer_state.open_state(tmp_path, **ADAM)
    assert opened.names == {f"opt_state/{name}" for name in flat_parameters(state)}
    loaded = []
    watched = dataclasses.replace(
        opened, load=lambda names: loaded.extend(names) or opened.load(names)
    )
    watched.moments(["blocks/0/kernel"])
    assert sorted(loaded) == ["opt_state/1/0/count", "opt_state/1/0/nu/blocks/0/kernel"]


@pytest.mark.parametrize("name", ["bare", "masked"])
def test_a_module_called_nu_is_not_taken_for_a_state(name):
    """Guards: `mu/nu/kernel` read as the second moments of `kernel`."""
    state, _, _ = run(NESTED[name], 1)
    # Nor is a module of the model that is saved beside the state.
    for source in (state, {"model": PARAMS, "optimizer": {"opt_state": state}}):
        assert find(source, "kernel", ADAM).siblings == {"count", "mu", "nu"}


def test_each_part_of_a_partition_has_its_own_count_and_constants():
    """Guards: another state's count; one part's b2 for all."""
    parts = {"nu": optax.MultiSteps(adam(b2=0.8, eps=0.3), 2), "rest": adam()}
    state, updates, g = run(optax.partition(parts, LABELS))
    described = ADAM | {"nu": {"b2": 0.8, "eps": 0.3}}
    for path in PATHS:
        moments = find(state, path, described)
        inner = path.startswith("blocks")
        assert int(moments.count) == (2 if inner else 4)
        step = g[path]
        if inner:
            step = (flat_parameters(gradients(2))[path] + step) / 2
        expected = -0.5 * step * optimizer_state.exact(moments)
        np.testing.assert_allclose(expected, updates[path], rtol=1e-4)


@pytest.mark.parametrize("outer", [False, True])
def test_injected_constants_win_over_the_description(outer):
    """Guards: the description's b2 where a schedule has moved it."""

    def b2(step):
        return 0.7 + 0.05 * step

    tx = optax.inject_hyperparams(adam)(b2=b2, eps=0.4, eps_root=0.3)
    if outer:
        # What the wrapper outside keeps under the same names is not this state's.
        inner = tx
        tx = optax.inject_hyperparams(lambda eps: optax.chain(optax.scale(eps / 0.9), inner))(0.9)
    state, updates, g = run(tx)
    moments = find(state, "v/kernel", ADAM)
    found = [float(moments.constants[k]) for k in ("b2", "eps", "eps_root")]
    np.testing.assert_allclose(found, [0.85, 0.4, 0.3], rtol=1e-6)
    expected = -0.5 * g["v/kernel"] * optimizer_state.exact(moments)
    np.testing.assert_allclose(expected, updates["v/kernel"], rtol=1e-5)


RULES = {
    "adam": (adam(), ADAM),
    "adamw": (optax.adamw(0.5, b1=0.0, b2=0.9, weight_decay=0.1, **EPS), {**ADAM, "name": "adamw"}),
    "nadam": (optax.nadam(0.5, b1=0.0, b2=0.9, **EPS), {**ADAM, "name": "nadam"}),
    "nadamw": (optax.nadamw(0.5, b1=0.0, b2=0.9, **EPS), {**ADAM, "name": "nadamw"}),
    "yogi": (optax.yogi(0.5, b1=0.0, b2=0.9, eps=0.03), {"name": "yogi", "b2": 0.9, "eps": 0.03}),
    "amsgrad": (optax.amsgrad(0.5, b1=0.0, b2=0.5, **EPS), {**ADAM, "name": "amsgrad"}),
    "rmsprop": (optax.rmsprop(0.5, eps=0.03), {"name": "rmsprop", "eps": 0.03}),
    "rmsprop outside": (
        optax.rmsprop(0.5, eps=0.03, eps_in_sqrt=False),
        {"name": "rmsprop", "eps": 0.03, "eps_in_sqrt": False},
    ),
    "rmsprop corrected": (
        optax.rmsprop(0.5, decay=0.8, eps=0.03, bias_correction=True),
        {"name": "rmsprop", "eps": 0.03, "decay": 0.8},
    ),
}


@pytest.mark.parametrize(("tx", "described"), RULES.values(), ids=RULES)
def test_exact_is_what_the_optimizer_multiplies_by(tx, described):
    """Guards: another optimizer's ν taken for Adam's, by a rule that is not its own."""
    state, updates, g = run(tx, steps=5)
    moments = find(state, "blocks/1/kernel", described)
    expected = -0.5 * g["blocks/1/kernel"] * optimizer_state.exact(moments)
    np.testing.assert_allclose(expected, updates["blocks/1/kernel"], rtol=1e-5)


REFUSED = {
    "no name": (adam(), {"b2": 0.9, "eps": 1e-8}, "does not say its optimizer's name, "),
    "no b2": (
        adam(),
        {"name": "adam", "eps": 1e-8},
        "optimizer's b2, which .* pass b2= to tda.second_moments",
    ),
    "no b2, eps": (adam(), {"name": "adam"}, "optimizer's b2, eps, which .* pass b2=, eps= to"),
    "no decay": (
        optax.rmsprop(0.5, bias_correction=True),
        {"name": "rmsprop", "eps": 1e-8},
        "optimizer's decay, which",
    ),
    "adamax": (optax.adamax(0.5), {**ADAM, "name": "adamax"}, "'adamax': its ν is an infinity"),
    "adabelief": (optax.adabelief(0.5), {**ADAM, "name": "adabelief"}, "variance about the mean"),
    "radam": (optax.radam(0.5), {**ADAM, "name": "radam"}, "not known here; known are adam, adamw"),
    "amsgrad as adam": (
        optax.amsgrad(0.5),
        ADAM,
        "'adam', whose state has count, mu, nu; .*nu_max",
    ),
    "adam as amsgrad": (
        adam(),
        {**ADAM, "name": "amsgrad"},
        "'amsgrad', whose state has .*nu_max;",
    ),
    "rmsprop as adam": (optax.rmsprop(0.5), ADAM, "the state at '0/' has nu$"),
    "centered": (
        optax.rmsprop(0.5, centered=True),
        {"name": "rmsprop", "eps": 1e-8},
        "whose state has nu; the state at '0/' has mu, nu",
    ),
}


@pytest.mark.parametrize(("tx", "described", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_refused(tx, described, message):
    """Guards: an infinity norm, a maximum or uncorrected moments taken silently for Adam's ν."""
    moments = find(tx.init(PARAMS), "v/kernel", described)
    with pytest.raises(SecondMomentError, match=message):
        optimizer_state.exact(moments)


def test_moments_that_are_there_twice_are_refused():
    state = optax.chain(adam(), adam()).init(PARAMS)
    with pytest.raises(
        SecondMomentError, match="more than once: 0/0/nu/v/kernel, 1/0/nu/v/kernel$"
    ):
        find(state, "v/kernel", ADAM)
    both = optax.chain(adam(), optax.scale_by_factored_rms()).init(PARAMS)
    with pytest.raises(SecondMomentError, match="0/0/nu/v/kernel, 1/v_row/v/kernel"):
        find(both, "v/kernel", ADAM)


def test_moments_that_are_missing_are_told_with_what_there_is():
    momentum = optax.sgd(0.1, momentum=0.9).init(PARAMS)
    with pytest.raises(
        SecondMomentError, match="it has 0/trace/v/kernel; under the names nu and v_row"
    ):
        find(momentum, "v/kernel", ADAM)
    masked = optax.masked(adam(), BLOCKS).init(PARAMS)
    with pytest.raises(
        SecondMomentError,
        match="no second moments of v/kernel; .* nothing; .*inner_state/0/nu/blocks/0/kernel",
    ):
        find(masked, "v/kernel", ADAM)


@pytest.mark.parametrize("labels", [("1", "0"), (1, 0)])
def test_labels_that_are_numbers_are_not_indices_of_a_chain(labels):
    """Guards: the constants of part 0 for all parts, since Adam's state is a chain's first."""
    inner, outer = labels
    parts = {inner: adam(b2=0.8), outer: adam(b2=0.9)}
    tree = jax.tree.map(lambda b: inner if b else outer, BLOCKS)
    state, _, _ = run(optax.partition(parts, tree))
    constants = {inner: {"b2": 0.8, **EPS}, outer: {"b2": 0.9, **EPS}}
    opened = second_moments.second_moments(state, optimizer="adam", parts=constants).state
    for path, moments in opened.moments(PATHS).items():
        assert moments.constants["b2"] == (0.8 if path.startswith("blocks") else 0.9)


def test_an_index_of_a_chain_is_no_label_of_a_partition():
    state, _, _ = run(optax.partition({"nu": adam(), "rest": adam()}, LABELS), 1)
    with pytest.raises(SecondMomentError, match="parts has the label '0', under which"):
        second_moments.second_moments(state, **ADAM_ARGUMENTS, parts={"0": {"b2": 0.8}})
