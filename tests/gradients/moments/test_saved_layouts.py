"""`tda.second_moments` of states as people keep and save them, each written by the real library."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import tda
from tda.gradients.moments.optimizer_state import SecondMomentError
from tda.gradients.sites import find_sites
from tda.model.functional import flat_parameters
from tda.training.checkpoint import CheckpointError

ADAM = {"b2": 0.9, "eps": 1e-3, "eps_root": 1e-4}
CONSTANTS = {"optimizer": "adamw", **ADAM}


class Block(nnx.Module):
    """Square matrices of one shape, which only their names tell apart; one is called `value`."""

    def __init__(self, rngs):
        self.key, self.value = (nnx.Linear(6, 6, use_bias=False, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.value(jnp.tanh(self.key(x)))


class Model(nnx.Module):
    def __init__(self):
        self.decoder = nnx.List([Block(nnx.Rngs(0)), Block(nnx.Rngs(1))])

    def __call__(self, x):
        for block in self.decoder:
            x = block(x)
        return x


MODEL = Model()
SITES = find_sites(MODEL)
PARAMS = nnx.to_pure_dict(nnx.state(MODEL, nnx.Param))


def gradients(step):
    """A tree of gradients like the parameters, all entries different."""
    rng = np.random.default_rng(step)
    leaves, structure = jax.tree.flatten(PARAMS)
    drawn = [rng.normal(size=x.shape) + np.sign(rng.normal(size=x.shape)) for x in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(x, jnp.float32) for x in drawn])


def adamw():
    return optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-3, **ADAM))


def optax_state(tx, steps=3, wrap=lambda tree: tree):
    """The state after some steps; `wrap` makes the tree of parameters that the optimizer sees."""
    params = wrap(PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        state = update(wrap(gradients(step)), state, params)[1]
    return state


def nnx_optimizer(tx, steps=3):
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(steps):
        g = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(g, gradients(step))
        optimizer.update(model, g)
    return optimizer


def train_state(wrap):
    """A TrainState of Linen after three steps."""
    state = TrainState.create(apply_fn=None, params=wrap(PARAMS), tx=adamw())
    for step in range(3):
        state = state.apply_gradients(grads=wrap(gradients(step)))
    return state


def nu_after(b2, squares):
    """ν of each parameter, corrected for bias, from the squares of its steps' gradients."""
    nu = 0.0
    for square in squares:
        nu = b2 * nu + (1 - b2) * square
    return nu / (1 - b2 ** len(squares))


def squares_of(path, steps=3):
    return [np.square(np.asarray(flat_parameters(gradients(s))[path])) for s in range(steps)]


def assert_scales(
    moments, root=lambda path: np.sqrt(nu_after(0.9, squares_of(path)) + 1e-4) + 1e-3
):
    scales = moments.scales(SITES, "adam")
    assert scales.keys() == {s.path for s in SITES} and len(scales) == 4
    for path, scale in scales.items():
        np.testing.assert_allclose(scale.dense(), 1 / root(path), rtol=2e-5)


STANDARD = ocp.args.StandardSave
IN_MEMORY = {
    "nnx.Optimizer": lambda: nnx_optimizer(adamw()),
    "nnx.Optimizer's state": lambda: nnx_optimizer(adamw()).opt_state,
    "nnx.State": lambda: nnx.state(nnx_optimizer(adamw())),
    "optax state": lambda: optax_state(adamw()),
    "one state of a chain": lambda: optax_state(adamw())[1][0],
    "dict": lambda: {"params": PARAMS, "opt_state": optax_state(adamw())},
    "FrozenDict": lambda: optax_state(adamw(), wrap=freeze),
    "TrainState": lambda: train_state(lambda p: p),
    "TrainState of variables": lambda: train_state(lambda p: {"params": p}),
}


@pytest.mark.parametrize("source", IN_MEMORY.values(), ids=IN_MEMORY)
def test_states_in_memory(source):
    """Guards: moments mapped to the wrong modules, or transposed, where all shapes are equal."""
    assert_scales(tda.second_moments(source(), **CONSTANTS))


def one_tree():
    return {"params": PARAMS, "opt_state": optax_state(adamw())}


def composite_of_nnx():
    optimizer = nnx_optimizer(adamw())
    return ocp.args.Composite(
        model=STANDARD(nnx.state(MODEL)), optimizer=STANDARD(nnx.state(optimizer))
    )


def composite_of_dicts():
    return ocp.args.Composite(params=STANDARD(PARAMS), opt_state=STANDARD(one_tree()["opt_state"]))


def maxtext():
    """MaxText's layout: items/, a TrainState of variables, whose adam_pax has no chain."""
    state = train_state(lambda p: {"params": p})
    return ocp.args.Composite(
        items=ocp.args.PyTreeSave(state.replace(opt_state=state.opt_state[1][0]))
    )


MANAGED = {
    "one tree": (lambda: STANDARD(one_tree()), "default"),
    "model, optimizer": (composite_of_nnx, "optimizer"),
    "params, opt_state": (composite_of_dicts, "opt_state"),
    "nnx.state(optimizer)": (lambda: STANDARD(nnx.state(nnx_optimizer(adamw()))), "default"),
    "nnx.state of the optax state": (
        lambda: STANDARD(nnx.state(nnx_optimizer(adamw()))["opt_state"]),
        "default",
    ),
    "pure dict": (lambda: STANDARD(nnx.to_pure_dict(nnx.state(nnx_optimizer(adamw())))), "default"),
    "TrainState": (lambda: STANDARD(train_state(lambda p: p)), "default"),
    "MaxText": (maxtext, "items"),
}


@pytest.mark.parametrize(("saved", "tree"), MANAGED.values(), ids=MANAGED)
def test_checkpoints_of_a_manager(saved, tree, tmp_path):
    """Guards: own format taken for everyone's."""
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=saved())
    for path in (tmp_path, tmp_path / "3", tmp_path / "3" / tree):
        assert_scales(tda.second_moments(path, **CONSTANTS))
    with pytest.raises(SecondMomentError, match="does not say its optimizer's name, b2, eps, "):
        tda.second_moments(tmp_path)


@pytest.mark.parametrize("source", ["nnx.State", "dict", "TrainState of variables"])
def test_checkpoints_without_a_directory_by_step(source, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", IN_MEMORY[source]())
    assert_scales(tda.second_moments(tmp_path / "c", **CONSTANTS))


def test_a_description_in_anyones_checkpoint_is_read(tmp_path):
    described = {"optimizer": {"name": "adamw", **ADAM}}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=STANDARD(one_tree()), custom_metadata={"optimizer": "ours"})
        manager.save(3, args=STANDARD(one_tree()), custom_metadata=described)
    assert_scales(tda.second_moments(tmp_path, step=2, **CONSTANTS))
    assert_scales(tda.second_moments(tmp_path))
    assert_scales(tda.second_moments(tmp_path, b2=0.9))
    with pytest.raises(SecondMomentError, match="description of .* differ: b2=0.99 and 0.9; leave"):
        tda.second_moments(tmp_path, b2=0.99)


def mask(first):
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: (getattr(path[1], "key", None) == 0) == first, params
    )


def label(params):
    return jax.tree.map(lambda first: "nu" if first else "rest", mask(True)(params))


def pairs(path):
    g = [np.asarray(flat_parameters(gradients(s))[path]) for s in range(4)]
    return [np.square((g[0] + g[1]) / 2), np.square((g[2] + g[3]) / 2)]


def adam_root(nu):
    return np.sqrt(nu + 1e-4) + 1e-3


def adafactor_root(path):
    # The decay rate of the first step is 0.
    V = squares_of(path, 1)[0]
    return np.sqrt(V.mean(1, keepdims=True) * V.mean(0, keepdims=True) / V.mean())


NAMED = {k: v for k, v in CONSTANTS.items() if k == "optimizer"}
CHAINS = {
    "masked": (
        optax.chain(optax.masked(adamw(), mask(True)), optax.masked(adamw(), mask(False))),
        CONSTANTS,
        lambda path: adam_root(nu_after(0.9, squares_of(path, 4))),
    ),
    "multi_transform": (
        optax.multi_transform({"nu": adamw(), "rest": adamw()}, label),
        CONSTANTS,
        lambda path: adam_root(nu_after(0.9, squares_of(path, 4))),
    ),
    "parts": (
        optax.partition({"nu": optax.adamw(1e-3, **ADAM | {"b2": 0.7}), "rest": adamw()}, label),
        CONSTANTS | {"b2": None, "parts": {"nu": {"b2": 0.7}, "rest": {"b2": 0.9}}},
        lambda path: adam_root(nu_after(0.7 if "/0/" in path else 0.9, squares_of(path, 4))),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, **ADAM),
        NAMED,
        lambda path: adam_root(nu_after(0.9, squares_of(path, 4))),
    ),
    "MultiSteps": (
        optax.MultiSteps(adamw(), 2),
        CONSTANTS,
        lambda path: adam_root(nu_after(0.9, pairs(path))),
    ),
    "apply_if_finite": (
        optax.apply_if_finite(adamw(), 3),
        CONSTANTS,
        lambda path: adam_root(nu_after(0.9, squares_of(path, 4))),
    ),
    "rmsprop": (
        optax.rmsprop(1e-3, decay=0.9, eps=1e-3),
        {"optimizer": "rmsprop", "eps": 1e-3},
        lambda path: np.sqrt(nu_after(0.9, squares_of(path, 4)) * (1 - 0.9**4) + 1e-3),
    ),
}


@pytest.mark.parametrize(("tx", "constants", "root"), CHAINS.values(), ids=CHAINS)
def test_chained_transforms_of_nnx(tx, constants, root, tmp_path):
    """Guards: another state's count or constants, under the names that nnx saves them by."""
    optimizer = nnx_optimizer(tx, steps=4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", nnx.state(optimizer))
    for source in (optimizer, tmp_path / "c"):
        assert_scales(tda.second_moments(source, **constants), root)


def test_adafactor_needs_no_constants(tmp_path):
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=4, multiply_by_parameter_scale=False)
    optimizer = nnx_optimizer(tx, steps=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", nnx.state(optimizer))
    for source in (optimizer, tmp_path / "c"):
        for path, scale in tda.second_moments(source).scales(SITES, "factored").items():
            np.testing.assert_allclose(scale.dense(), 1 / adafactor_root(path), rtol=1e-5)


def test_adam_pax_has_corrected_its_moments():
    """MaxText's and Praxis' decay rate, b2 (1 − b2^(t−1)) / (1 − b2^t), leaves no bias in ν."""
    nu, b2 = jax.tree.map(jnp.zeros_like, PARAMS), 0.9
    for step in range(3):
        rate = b2 * (1 - b2**step) / (1 - b2 ** (step + 1))
        nu = jax.tree.map(lambda v, g, r=rate: r * v + (1 - r) * jnp.square(g), nu, gradients(step))
    state = optax.ScaleByAdamState(jnp.int32(3), jax.tree.map(jnp.zeros_like, nu), nu)
    constants = {"optimizer": "adam_pax", "eps": 1e-3, "eps_root": 1e-4}
    assert_scales(tda.second_moments({"opt_state": state}, **constants))


NOTHING = {
    "lion": (optax.lion(1e-3), {"optimizer": "lion"}, r"\(lion: it keeps no second moments\)"),
    "lion, unnamed": (optax.lion(1e-3), {}, "nothing under the names nu and v_row; it has 0/count"),
    "sgd": (optax.sgd(1e-3), {}, "it has nothing"),
    "adamax": (optax.adamax(1e-3), CONSTANTS | {"optimizer": "adamax"}, "an infinity norm"),
    "lamb": (optax.lamb(1e-3), CONSTANTS | {"optimizer": "lamb"}, "not known here"),
    "beta2": (adamw(), {"beta2": 0.9}, "unknown constants beta2; an optimizer's are b2, eps"),
    "no eps": (adamw(), {"optimizer": "adamw", "b2": 0.9}, "say its optimizer's eps, .*pass eps="),
    "text": (adamw(), CONSTANTS | {"b2": "0.9"}, "b2='0.9' must be a number from 0 and below 1"),
    "range": (adamw(), CONSTANTS | {"b2": 1.5}, "b2=1.5 must be a number from 0 and below 1"),
    "sign": (adamw(), CONSTANTS | {"eps": -1e-8}, "eps=-1e-08 must be a number from 0"),
    "name": (adamw(), CONSTANTS | {"optimizer": "Adam"}, "^optimizer='Adam': .*; known are adam, "),
    "adamw": (adamw(), {}, "'1/0' does not say .* pass optimizer=, b2=, eps= to .*adam_pax"),
}


@pytest.mark.parametrize(("tx", "constants", "message"), NOTHING.values(), ids=NOTHING)
def test_what_has_no_known_second_moments_is_refused(tx, constants, message):
    with pytest.raises(SecondMomentError, match=message):
        tda.second_moments(optax_state(tx, 1), **constants).scales(SITES, "adam")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"matrices": {"b2": 0.9}}, "label 'matrices', under which .* it has them under opt_st"),
        ({"matrix": {"beta2": 0.9}}, r"parts\['matrix'\]: unknown constants beta2"),
        ({"matrix": {"b2": 9}}, r"parts\['matrix'\]: b2=9 must be a number from 0"),
    ],
)
def test_constants_of_a_part_that_would_have_no_effect_are_refused(parts, message):
    """Guards: the constants of another part, or none, in silence."""
    labels = {"matrix": adamw(), "other": optax.sgd(1e-3)}
    tx = optax.partition(labels, lambda tree: jax.tree.map(lambda x: "matrix", tree))
    state = {"opt_state": (tx.init({"kernel": jnp.ones((4, 4))}),)}
    moments = tda.second_moments(state, parts={"matrix": CONSTANTS})
    assert moments.state.moments(["kernel"])["kernel"].constants["name"] == CONSTANTS["optimizer"]
    with pytest.raises(SecondMomentError, match=message):
        tda.second_moments(state, **CONSTANTS, parts=parts)


def test_moments_that_are_no_means_of_squares_are_refused():
    """Guards: numbers below 0 raised to the floor, and so scaled most of all."""
    state = optax_state(adamw(), 1)[1][0]
    spoilt = state._replace(nu=jax.tree.map(lambda x: x.at[0, 0].set(-1e-3), state.nu))
    with pytest.raises(SecondMomentError, match="nu of decoder/0/key/kernel has numbers below 0"):
        tda.second_moments(spoilt, **CONSTANTS).scales(SITES, "factored")
    replicas = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(
        SecondMomentError, match=r"count of decoder/0/.* the shape \(2,\), not \(\)"
    ):
        tda.second_moments(replicas, **CONSTANTS).scales(SITES, "adam")


def test_a_step_of_a_state_in_memory_is_refused():
    state = optax.adam(1e-3).init({"w": jnp.ones((2, 2))})
    with pytest.raises(SecondMomentError, match="step=5 has no effect on a state in memory"):
        tda.second_moments(state, optimizer="adam", b2=0.99, eps=1e-8, step=5)


def test_a_checkpoint_of_parameters_alone_is_refused(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": PARAMS})
    with pytest.raises(CheckpointError, match=r"\(it holds params\); .* are estimated"):
        tda.second_moments(tmp_path / "c", **CONSTANTS)


@pytest.mark.parametrize("rename", [{"kernel": "weight"}, {"key": "keys"}, {"decoder": "encoder"}])
def test_matrices_of_the_same_shape_and_another_name_are_refused(rename):
    """Guards: a square matrix, transposed (PyTorch's `weight`) or another's, taken by its shape."""

    def renamed(tree):
        if not isinstance(tree, dict):
            return tree
        return {rename.get(k, k): renamed(x) for k, x in tree.items()}

    moments = tda.second_moments(optax_state(adamw(), wrap=renamed), **CONSTANTS)
    with pytest.raises(SecondMomentError, match="no second moments of decoder/0/.*it has nothing"):
        moments.scales(SITES, "adam")


def test_moments_below_another_module_are_not_taken():
    """Guards: the encoder's moments for a decoder of the same names."""
    state = optax_state(adamw(), wrap=lambda tree: {"teacher": tree})
    with pytest.raises(SecondMomentError, match="no second moments of decoder/0/key/kernel; of "):
        tda.second_moments(state, **CONSTANTS).scales(SITES, "adam")


def test_trace_takes_second_moments():
    """Guards: scales that are ignored, or of another correction or choice of parameters."""
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(8, 6)).astype(np.float32)}]
    moments = tda.second_moments(nnx_optimizer(adamw()), **CONSTANTS)

    def scores(scales, correction=None):
        traced = tda.trace(
            MODEL,
            batches,
            [{"x": batches[0]["x"][:2]}],
            loss=lambda model, batch: jnp.square(model(batch["x"])).sum(1),
            scales=scales,
            correction=correction,
            include="value",
            quiet=True,
        )
        return [p.score for p in traced[0].proponents]

    for correction in ("adam", "factored"):
        expected = moments.scales(find_sites(MODEL, "value"), correction)
        np.testing.assert_allclose(scores(moments, correction), scores(expected))
    assert scores(moments, "adam") != scores(None, "adam")
    with pytest.raises(ValueError, match="scales is of type Optimizer, .* tda.second_moments"):
        scores(nnx_optimizer(adamw()))
