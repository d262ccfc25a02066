"""A worker's side: stages that stop where groups are asked for, and compute them on demand."""

import pytest

from tda.runtime import on_demand
from tda.runtime.engine import Work
from tda.runtime.on_demand import OnDemand, WorkerError


class Stages:
    """Two works in turn, whose results are sets of numbers, as files would be."""

    def __init__(self):
        self.results = {"first": set(), "second": set()}
        self.starts, self.reduced, self.failing = 0, [], None

    def __call__(self, engine):
        self.starts += 1
        if engine.is_opening:
            return
        for name, results in self.results.items():
            engine.compute(Work(name, self._compute(name), None, lambda r=results: [*({0, 1} - r)]))
            self.reduced.append(name)

    def _compute(self, name):
        model = object()  # what a stage holds in memory while its groups are asked for

        def compute(numbers):
            assert model is not None
            if self.failing in numbers:
                raise FloatingPointError(f"group {self.failing}")
            self.results[name].update(numbers)

        return compute


def test_groups_of_a_work_are_computed_by_one_start_of_the_stages():
    stages = Stages()
    worker = OnDemand(stages)
    worker.open()
    for number in (1, 0):
        worker.request("first", number)
    assert stages.results["first"] == {0, 1} and stages.starts == 2 and stages.reduced == []
    # The next work: the stages start again, and find the first one finished.
    worker.request("second", 1)
    assert stages.results["second"] == {1} and stages.starts == 3 and stages.reduced == ["first"]


def test_a_worker_opens_before_the_model_is_trained():
    results, trained = {"tokens": set(), "encode": set()}, []

    def stages(engine):
        for name, missing in results.items():
            engine.compute(
                Work(
                    name,
                    missing.update,
                    None,
                    lambda r=missing: [*({0, 1} - r)],
                    precedes_training=name == "tokens",
                )
            )
            if not trained:
                raise ValueError("not trained")
            if engine.is_opening:
                return

    worker = OnDemand(stages)
    worker.open()
    assert results == {"tokens": set(), "encode": set()}
    for number in (0, 1):
        worker.request("tokens", number)
    with pytest.raises(ValueError, match="not trained"):
        worker.request("encode", 1)
    trained.append(True)
    worker.request("encode", 1)
    assert results == {"tokens": {0, 1}, "encode": {1}}
    OnDemand(stages).open()


def test_an_error_of_a_group_is_raised_and_the_worker_goes_on():
    stages = Stages()
    worker, stages.failing = OnDemand(stages), 1
    with pytest.raises(FloatingPointError, match="group 1"):
        worker.request("first", 1)
    worker.request("first", 0)
    assert stages.results["first"] == {0}


def test_a_worker_that_does_not_come_to_a_work_says_so(monkeypatch):
    monkeypatch.setattr(on_demand, "_PATIENCE", 0.0)
    stages = Stages()
    worker = OnDemand(stages)
    # Asked for the second work though results of the first are not seen here.
    with pytest.raises(WorkerError, match="came to first, of which it does not see 2 results"):
        worker.request("second", 0)
    stages.results["first"] |= {0, 1}
    worker.request("second", 0)
    stages.results["second"] |= {1}
    with pytest.raises(WorkerError, match="did not come to third"):
        worker.request("third", 0)


def test_a_worker_knows_what_it_is_asked_for():
    asked = []

    def stages(engine):
        asked.append([engine.asks_for(name) for name in ("a-1", "b-2", "c-3")])

    worker = OnDemand(stages)
    with pytest.raises(WorkerError):
        worker.request("encode a-1 and b-2", 0)
    assert asked == [[True, True, False]]
