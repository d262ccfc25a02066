"""Live questions by sums over checkpoints: a run's own queries have the run's own answers."""

import pytest

from tda import store as stores
from tda.live import finished_run
from tda.run import remembered, stages
from tda.run.workdir import Workdir
from tests.experiments.test_trace import make_config
from tests.live.test_live_methods import asked, check, linked, of_batch, silent

pytestmark = pytest.mark.slow
NAMES = ["tracin", "less", "trak"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, runs_on_one_device):
    """A finished run of two checkpoints."""
    folder = tmp_path_factory.mktemp("summed")
    config = make_config(folder)
    config.methods = ",".join([*NAMES, "bm25"])
    config.eval.tail_patch_queries = config.eval.samples = 0
    config.train.keep, config.train.save_every, config.train.epochs = 0, 1, 3.0
    config.projection.blocks, config.several.checkpoints = 1, 2
    config.hessian.damping = 0.05
    stages.trace(config, Workdir(folder / "w"))
    return folder / "w"


def test_sums_over_checkpoints_are_those_of_the_run(workdir):
    run = finished_run.open_workdir(workdir)
    for number in (0, 2):
        found = run.trace(silent, asked(workdir, number), NAMES, 10)
        check(found, workdir, number)
    scores = [of_batch(workdir, n, 0)["proponent_scores"] for n in NAMES]
    assert all(max(map(abs, s)) > 0 for s in scores)
    with pytest.raises(ValueError, match="not inner products with one plain gradient"):
        run.heat(silent, asked(workdir), "tracin", "s00")


def test_a_store_that_is_gone_is_told(workdir, tmp_path):
    folder = linked(workdir, tmp_path / "w", "model", "stages", "corpus.npz", remembered.CONFIG)
    (folder / "stores").mkdir()
    kept = [p for p in (workdir / "stores").iterdir() if p.name.startswith(("corpus", "queries"))]
    steps = {stores.open_store(p).manifest["fingerprint"]["step"] for p in kept}
    assert len(steps) == 2
    for path in kept:
        if stores.open_store(path).manifest["fingerprint"]["step"] == max(steps):
            (folder / "stores" / path.name).symlink_to(path)
    told = {
        m["name"]: m["lacks"] for m in finished_run.open_workdir(folder).describe(silent)["methods"]
    }
    for name in NAMES:
        assert f"no store of gradients of {min(steps)}:" in told[name]
        assert "several.keep_stores=False" in told[name]
