"""What a sweep file may say, and what its points share."""

import pytest

from tda.run import defaults
from tda.sweep import grid


def write(path, body):
    path.write_text(f"def get_sweep():\n    return {body}\n")
    return str(path)


def test_a_grid_is_the_product_of_its_axes(tmp_path):
    path = write(
        tmp_path / "s.py",
        """{
        "fixed": {"methods": "grad_cos", "train.epochs": 2},
        "axes": {"hessian.weight": (0, 0.5), "model.size, train.learning_rate":
                 (("tiny", 1e-3), ("mini", 2e-3))},
    }""",
    )
    found = grid.load(path, defaults.get_config())
    assert found.axes == ("hessian.weight", "model.size", "train.learning_rate")
    assert [tuple(p.values.values()) for p in found.points] == [
        (0, "tiny", 1e-3), (0, "mini", 2e-3), (0.5, "tiny", 1e-3), (0.5, "mini", 2e-3),
    ]  # fmt: skip
    last = found.points[-1].config
    assert (last.hessian.weight, last.model.size, last.train.learning_rate) == (0.5, "mini", 2e-3)
    assert (last.methods, last.train.epochs, last.seed) == ("grad_cos", 2.0, 0)
    assert len({p.name for p in found.points}) == 4
    # A point's name does not hang on the rest of the grid, but on what else its file fixes.
    names = []
    for fixed, weights in (({}, [0.5]), ({}, [0, 0.5]), ({"train.epochs": 2}, [0.5])):
        body = f'{{"axes": {{"hessian.weight": {weights}}}, "fixed": {fixed}}}'
        names.append(grid.load(write(tmp_path / "t.py", body), last).points[-1].name)
    assert names[0].startswith("weight=0.5-") and names[0] == names[1] != names[2]
    # What λ leaves as it is, is shared; another model is not.
    trainings, stores = ([getattr(p, k) for p in found.points] for k in ("training", "stores"))
    assert trainings[0] == trainings[2] != trainings[1] == trainings[3]
    assert stores[0] == stores[2] != stores[1] == stores[3]


@pytest.mark.parametrize(
    "key, trains, encodes",
    [
        ("hessian.damping", False, False),
        ("metrics.writers", False, False),
        ("judge.sentences", False, False),
        ("rerank.candidates", False, True),
        ("eval.tail_patch_learning_rate", False, False),
        ("projection.side", False, True),
        ("gradients.correction", False, True),
        ("train.traced", False, True),
        ("train.epochs", True, True),
        ("seed", True, True),
        ("data.n_sentences", True, True),
    ],
)
def test_what_each_key_makes_anew(key, trains, encodes):
    values = {
        "gradients.correction": "adam",
        "metrics.writers": "wandb",
        "rerank.candidates": "bm25",
        "train.traced": 0.5,
    }.get(key, 1)
    config = defaults.get_config()
    other = grid._with_values(config, {key: values}, "s.py")
    a, b = grid.Point("a", {}, config), grid.Point("b", {}, other)
    assert (a.training != b.training) == trains and (a.stores != b.stores) == encodes
    # The uncorrected store is the same under every correction, and candidates may need the same
    # store: not to be encoded twice at a time.
    apart = encodes and key not in ("gradients.correction", "rerank.candidates")
    assert (a.encoding != b.encoding) == apart


@pytest.mark.parametrize(
    "key, value, trains",
    [
        ("projection.side", 2, True),
        ("projection.seed", 1, True),
        ("gradients.exclude", "mlp", True),
        ("store.dtype", "float32", True),
        ("store.root", "elsewhere", True),
        ("store.shard_bytes", 1 << 10, False),
        ("gradients.correction", "adam", False),
        ("hessian.damping", 1.0, False),
    ],
)
def test_trainings_that_capture_other_gradients_are_apart(tmp_path, key, value, trains):
    config = defaults.get_config()
    for captures in (False, True):
        config.train.capture = captures
        other = grid._with_values(config, {key: value}, "s.py")
        a, b = grid.Point("a", {}, config), grid.Point("b", {}, other)
        assert (a.training != b.training) == (trains and captures)


@pytest.mark.parametrize("key, value", [("train.save_every", 50), ("train.keep", 0)])
@pytest.mark.parametrize(
    "changes, trains",
    [
        ({"methods": "tracin"}, True),
        ({"methods": "rerank_cos", "rerank.candidates": "bm25,trak"}, True),
        ({"train.capture": True}, True),
        ({"methods": "trackstar"}, False),
    ],
)
def test_methods_of_several_checkpoints_have_those_of_their_point(key, value, changes, trains):
    """Mistake: the figures of all points by the checkpoints that the first one kept."""
    config = grid._with_values(defaults.get_config(), changes, "s.py")
    other = grid._with_values(config, {key: value}, "s.py")
    for is_board in (False, True):
        a, b = (grid.Point("p", {}, c, is_board) for c in (config, other))
        assert (a.training != b.training) == (trains and not is_board)


@pytest.mark.parametrize(
    "key, value, retrains",
    [
        ("counterfactual.methods", "in_run", False),
        ("counterfactual.own_top", 3, False),
        ("projection.side", 2, False),
        ("counterfactual.epochs", 3.0, True),
        ("counterfactual.held_out", 4, True),
        ("train.traced", 0.5, True),
        ("seed", 1, True),
    ],
)
def test_points_that_retrain_alike_share_a_bank(tmp_path, key, value, retrains):
    path = write(tmp_path / "s.py", f'{{"axes": {{"{key}": [{value!r}]}}}}')
    config = defaults.get_config()
    (traced,), (held,) = (grid.load(path, config, b).points for b in (False, True))
    assert held.name == f"board,{traced.name}" and not traced.is_board and held.is_board
    assert (held.training != grid.Point("p", {}, config, is_board=True).training) == retrains


@pytest.mark.parametrize(
    "body, message",
    [
        ('{"axes": {"hessian.weigh": [1]}}', "no key 'hessian.weigh'; did you mean hessian.weight"),
        ('{"axes": {"hessian.weight": ["x"]}}', "cannot set hessian.weight='x'"),
        ('{"axes": {"hessian.weight": []}}', "axis 'hessian.weight' needs a list of values"),
        ('{"axes": {"seed, hessian.weight": [(1,)]}}', "a list of values, each a tuple of 2"),
        ('{"axes": {"seed": [1], "seed, train.epochs": [(1, 2)]}}', "a key is on two axes"),
        # Mistake: a spread over seeds that has one of them twice.
        ('{"axes": {"seed": [0, 1, 0]}}', "an axis has a value twice, so that {'seed': 0} is"),
        ('{"axes": {}}', "no axes"),
        ('{"axes": {"seed": 1}}', "axis 'seed' needs a list of values, not 1"),
        ('{"axes": {"seed": None}}', "axis 'seed' needs a list of values, not None"),
        ('{"axes": {"methods": "bm25"}}', "axis 'methods' needs a list of values, not 'bm25'"),
        (
            '{"axes": {"seed, model.size": (1, 2)}}',
            "axis 'seed, model.size' needs a list of values",
        ),
        ('{"axes": {"seed, model.size": ["ab"]}}', "axis 'seed, model.size' needs a list"),
        ('{"axes": {"seed": __import__("numpy").eye(2)}}', "cannot set seed=array"),
        ('{"axes": ["seed"]}', r"axes is \['seed'\]; give a dict by key"),
        ('{"axes": {0: [1]}}', "axes is {0: .*; give a dict by key"),
        ('{"axes": {"seed": [1]}, "fixed": "seed"}', "fixed is 'seed'; give a dict by key"),
        ("None", r"get_sweep\(\) is None; give a dict by key"),
        ('{"axes": {"seed": [1]}, "plot": []}', "unknown plot"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, body, message):
    with pytest.raises(ValueError, match=rf"s.py: .*{message}"):
        grid.load(write(tmp_path / "s.py", body), defaults.get_config())


def test_numbers_of_numpy_are_as_pythons(tmp_path):
    loaded = []
    for seeds, rows, side in (
        ("(0, 1)", "[(8, 0.5), (16, 0.25)]", "2"),
        ("np.arange(2)", "zip(np.array([8, 16]), np.float32([0.5, 0.25]))", "np.int64(2)"),
    ):
        axes = f'"seed": {seeds}, "model.context, train.learning_rate": {rows}'
        body = f'{{"axes": {{{axes}}}, "fixed": {{"projection.side": {side}}}}}'
        path = write(tmp_path / "s.py", body.replace("np.", "__import__('numpy')."))
        loaded.append(grid.load(path, defaults.get_config()).points)
    assert loaded[0] == loaded[1] and len({p.name for p in loaded[0]}) == 4


def test_other_files_are_refused(tmp_path):
    (tmp_path / "s.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="no function get_sweep"):
        grid.load(str(tmp_path / "s.py"), defaults.get_config())
    with pytest.raises(FileNotFoundError):
        grid.load(str(tmp_path / "absent.py"), defaults.get_config())
