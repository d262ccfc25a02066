"""`experiments.plan`: what is reckoned for a config, what is refused, and what is printed."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from configs import paper_c4
from tda.gradients import encoder as encoders
from tda.gradients.projection import Projection
from tda.gradients.sites import find_sites
from tda.model.decoder import Decoder
from tda.model.settings import DecoderSettings
from tda.plan import calibration, chips, cost, planner, report, setting
from tda.run import corpus, defaults, train
from tda.run.workdir import Workdir
from tda.runtime import sharding

TEBI, GIBI = 2**40, 2**30


def stage(plan, name):
    """The first stage whose name begins so."""
    return next(s for s in plan["stages"] if s["stage"].startswith(name))


@pytest.fixture(scope="module")
def paper():
    """The plan of the paper's config on a slice of 256 TensorCores."""
    return planner.run(paper_c4.get_config(), hardware=chips.parse("v5p-256"))


def test_the_papers_store_takes_87_tebibytes(paper):
    assert paper["disk"]["float32"]["store"] == 365_000_000 * 65_536 * 4
    assert paper["needs"]["stores on disk"]["needed"] == (365_000_000 + 5_415) * 65_536 * 4
    assert paper["disk"]["codes"] == 365_000_000 * 16_384
    text = report.text(paper)
    for told in ("87.0 TiB", "128 × TPU v5p (256 TensorCores)", "40% of 459 TFLOP/s", "65,536"):
        assert told in text
    assert paper["setting"] | {"parameters": 8_030_261_248, "blocks": 16} == paper["setting"]
    assert paper["lacking"] == [] and "DOES NOT FIT" not in text


def test_the_papers_corpus_takes_7_tebibytes_as_recommended():
    config = paper_c4.get_config("recommended")
    plan = planner.run(config, hardware=chips.parse("v5p-256"), disk=7 * TEBI)
    assert plan["lacking"] == [] and plan["disk"]["dtype"] == "2bit"
    assert 6 * TEBI < plan["needs"]["stores on disk"]["needed"] < 7 * TEBI
    assert planner.run(paper_c4.get_config(), hardware=chips.parse("v5p-256"), disk=7 * TEBI)[
        "lacking"
    ]
    with pytest.raises(ValueError, match="paper_c4.py:half: give paper or recommended"):
        paper_c4.get_config("half")


def test_a_run_computes_in_bfloat16_on_accelerators_and_the_plan_too(small, monkeypatch):
    named = planner.run(small, hardware=chips.parse("h100"))
    assert named["setting"]["dtype"] == "bfloat16" and small.model.dtype == "auto"
    assert setting.of(small).dtype == "float32" == train.model_arguments(small)["dtype"]
    monkeypatch.setattr(sharding, "is_accelerated", lambda: True)
    assert setting.of(small).dtype == "bfloat16" == train.model_arguments(small)["dtype"]
    # Full float32 takes as much longer as the chip is slower at it.
    small.model.dtype = "float32"
    slow, chip = planner.run(small, hardware=chips.parse("h100")), chips.parse("h100").chip
    seconds = [stage(plan, "encode corpus")["seconds"] for plan in (slow, named)]
    assert seconds[0] / seconds[1] == pytest.approx(chip.bfloat16 / chip.float32)
    assert "40% of 67 TFLOP/s (float32)" in report.text(slow)


def test_hours_are_operations_over_the_share_of_the_peak(paper):
    encode = stage(paper, "encode corpus")
    assert encode["operations"] == pytest.approx(4 * 7.5e9 * 160e9, rel=0.05)
    assert encode["seconds"] == pytest.approx(encode["operations"] / (128 * 459e12 * 0.4))
    assert encode["rate"] == pytest.approx(160e9 / encode["seconds"])
    other = planner.run(paper_c4.get_config(), hardware=chips.parse("v5p-512"), mfu=0.2)
    other = stage(other, "encode corpus")
    assert other["seconds"] == pytest.approx(encode["seconds"], rel=1e-3)
    # R and the search wait for the disk: 87 TiB at 1 GB/s on each of 32 hosts.
    eigen = 3 * 9 * 16 * 4096**3  # two spectra and a root
    peak = 459e12 / 6 * 0.4
    r, search = paper["stages"][-2:]
    assert r["seconds"] == pytest.approx(95_682.56 / 32 + eigen / peak)
    assert search["seconds"] == pytest.approx(95_682.56 / 32, rel=1e-4)
    fast = planner.run(paper_c4.get_config(), hardware=chips.parse("v5p-256"), reading=1e15)
    gram = 2 * 365e6 * 16 * 4096**2
    found = {s["stage"]: s["seconds"] for s in fast["stages"]}
    assert found["R, factored"] == pytest.approx((gram / 128 + eigen) / peak)
    scores = 2 * 365e6 * 65_536 * 5_415
    assert found["exact search, factored"] == pytest.approx((gram + scores) / (128 * peak))


def test_tokenising_holds_the_chips_and_hosts_have_their_memory(paper):
    """Guards: a stage of the hosts that costs nothing; a shard that no host can hold."""
    tokenise = stage(paper, "read and tokenise")
    assert tokenise["seconds"] == pytest.approx(160e9 / (32 * 208 * 3e5))
    assert tokenise["devices"] == 128
    slow = planner.run(paper_c4.get_config(), hardware=chips.parse("v5p-256"), tokenising=3e3)
    assert stage(slow, "read and tokenise")["seconds"] == pytest.approx(100 * tokenise["seconds"])
    # Fewer chips than a host has come with their share of it.
    one = stage(planner.run(paper_c4.get_config(), hardware=chips.parse("h100x4")), "read")
    assert one["seconds"] == pytest.approx(160e9 / (112 * 3e5))
    # Everything beside encoding takes less than a tenth of encoding's device hours.
    spent = sum(s["seconds"] * s["devices"] for s in paper["stages"])
    encoding = stage(paper, "encode corpus")
    assert spent < 1.1 * encoding["seconds"] * encoding["devices"]
    config = paper_c4.get_config()
    config.store.dtype, config.store.shard_bytes = "int8", 128 << 30
    found = planner.run(config, hardware=chips.parse("v5e-256"))
    # Encoded as stored, with the shard before it still being written.
    assert found["lacking"] == [
        "two shards of gradients on a host: 256.0 GiB needed, 178.8 GiB available"
    ]


def test_each_correction_of_the_methods_has_a_store_of_its_own():
    config = paper_c4.get_config()
    config.methods = "trackstar,trackstar_raw,grad_cos,bm25"
    found = planner.run(config, hardware=chips.parse("v5p-256"))
    one = (365_000_000 + 5_415) * 65_536 * 4
    assert found["needs"]["stores on disk"]["needed"] == 2 * one
    stages = [s["stage"] for s in found["stages"]]
    # One pass for both; the queries are few.
    assert [n for n in stages if n.startswith("encode corpus")] == [
        "encode corpus, factored and none"
    ]
    assert "2 stores" in report.text(found)
    s = setting.of(config)
    assert s.decompositions("none") == (1, 3)  # grad_cos needs none
    assert s.hessians() == (2, 1)
    config.hessian.weight = 0.9
    assert setting.of(config).decompositions("none") == (1, 1)


def test_the_second_stage_is_counted(paper):
    """And the first stage of its candidates, where the table has no such row."""
    config = paper_c4.get_config()
    config.methods, config.rerank.passages = "rerank_cos,rerank_exp4", 1000
    config.rerank.candidates = "trackstar,bm25"
    found = planner.run(config, hardware=chips.parse("v5p-256"))
    assert stage(found, "encode corpus") == stage(paper, "encode corpus")
    s = setting.of(config)
    assert s.reranking == (2, 2000)
    length = 160e9 / 365e6
    (m, n) = s.sites[0].rows, s.sites[0].columns
    one = cost.pair_operations([cost.Matrix(m, n)], length, 10)
    assert one == 2 * 10 * min(length * (m + n), m * n)
    assert cost.pair_operations([cost.Matrix(m, n, looked_up=True)], length, 10) == 20 * length * n
    config.gradients.include, config.model.size, config.projection.blocks = ".", "tiny", 1
    embedding = [x for x in setting.of(config).matrices() if x.rows == config.tokenizer.vocab_size]
    assert {x.looked_up for x in embedding} == {True, False}  # tied
    pairs = 2 * 5415 * 2000 * cost.pair_operations(s.matrices(), *s.mean_lengths())
    encoding = 5415 * 2000 * length * cost.model_operations(s.model, (length + 1) / 2)
    second = stage(found, "second stage")
    assert second["operations"] == pytest.approx(pairs + encoding, rel=0.01)
    assert second["seconds"] > 0


def test_a_pass_of_two_corrections_counts_the_model_once(paper):
    """And methods that are not reckoned are told, not taken for others."""
    config = paper_c4.get_config()
    config.methods = "trackstar,grad_cos,tracin,trak,ekfac,trackstar_disjoint"
    found = planner.run(config, hardware=chips.parse("v5p-256"))
    s = setting.of(config)
    alone = stage(paper, "encode corpus")["operations"]
    more = cost.tap_operations(s.taps["none"])
    assert 0 < more < 0.05 * alone / 160e9
    both = stage(found, "encode corpus")["operations"]
    positions = sum(B * T * n for (B, T), n in s.shapes.items())
    assert both == pytest.approx(alone + more * positions)
    assert found["left_out"] == ["TracIn", "TRAK", "EK-FAC influence"]
    assert "not estimated" in report.text(found)
    assert "TracIn, TRAK, EK-FAC influence" in report.text(found)
    assert "not estimated" not in report.text(paper)
    assert len(s.methods["factored"]) == 2  # R_eval of a half is a search like another
    config.store.dtype = "none"
    assert setting.of(config).passes == [("factored",), ("none",)]
    config.methods = "tracin"
    with pytest.raises(ValueError, match="searches the gradients of one checkpoint"):
        setting.of(config)


def test_r_of_a_sample_reads_and_multiplies_the_sample():
    config = paper_c4.get_config()
    config.hessian.sample = 3_650_000
    found = planner.run(config, hardware=chips.parse("v5p-256"))
    stages = {s["stage"]: s for s in found["stages"]}
    eigen = 3 * 9 * 16 * 4096**3
    assert stages["R, factored"]["operations"] == 2 * 3_650_000 * 16 * 4096**2 + eigen
    # 1% of 87 TiB at 32 GB/s takes longer than its products.
    seconds = 956.8256 / 32 + eigen / (459e12 / 6 * 0.4)
    assert stages["R, factored"]["seconds"] == pytest.approx(seconds)
    assert stages["exact search, factored"]["seconds"] == pytest.approx(95_682.56 / 32)


def test_without_a_store_the_corpus_is_encoded_again_for_r(paper):
    config = paper_c4.get_config()
    config.store.dtype = "none"
    found = planner.run(config, hardware=chips.parse("v5p-256"))
    assert found["needs"]["stores on disk"]["needed"] == 0
    assert "no store" in report.text(found)
    stages = {s["stage"]: s["seconds"] for s in found["stages"]}
    once = stage(paper, "encode corpus")["seconds"]
    assert stages["encode corpus, factored"] == pytest.approx(once)
    assert stages["encode corpus for R, factored"] == pytest.approx(once)
    # Nothing is read: products alone.
    scores = 2 * 365e6 * (65_536 * 5_415 + 16 * 4096**2)
    assert stages["exact search, factored"] == pytest.approx(scores / (128 * 459e12 / 6 * 0.4))
    config.hessian.sample = 36_500_000
    found = planner.run(config, hardware=chips.parse("v5p-256"))
    stages = {s["stage"]: s for s in found["stages"]}
    again = stages["encode corpus for R, factored"]
    assert again["seconds"] == pytest.approx(once / 10)
    assert again["rate"] == pytest.approx(stage(paper, "encode corpus")["rate"])


def test_a_model_over_several_hosts_is_warned_of(paper):
    """Guards: a config whose hosts encode every shard together, and wait for each other."""
    assert paper["warnings"] == [] and "warning" not in report.text(paper)
    config = paper_c4.get_config()
    config.mesh.fsdp = 8
    for name, warned in (("v5p-256", True), ("h100x16", False), ("h100x8", False)):
        plan = planner.run(config, hardware=chips.parse(name))
        text = "warning: mesh.fsdp=8 × mesh.tensor=1 do not divide the 4 chips of a host"
        assert (text in report.text(plan)) == warned == bool(plan["warnings"])


def test_what_does_not_fit_is_refused():
    config = paper_c4.get_config()
    hardware = chips.parse("v5e-64")
    found = planner.run(config, hardware=hardware, disk=50 * TEBI)
    assert found["lacking"] == ["stores on disk: 87.0 TiB needed, 50.0 TiB available"]
    told = report.text(found).splitlines()[-1].split()
    assert told == "stores on disk 87.0 TiB 50.0 TiB DOES NOT FIT".split()
    # A block for each of 224 matrices of side 128, 2 GiB each in float64.
    config.projection.side, config.projection.pooling = 128, "matrix"
    found = planner.run(config, hardware=hardware, host_memory=512 * GIBI)
    assert any(x.startswith("R, its roots and eigenvectors on a host: ") for x in found["lacking"])
    assert found["needs"]["R, its roots and eigenvectors on a host"]["needed"] > 2 * 224 * 2 * GIBI
    assert "hessian.structure=kronecker needs" in report.text(found)
    config.hessian.structure = "kronecker"
    small = planner.run(config, hardware=hardware, host_memory=512 * GIBI)
    needs = small["needs"]["R, its roots and eigenvectors on a host"]["needed"]
    assert needs == cost.hessian_bytes([(128, 128)] * 224, 2, 1) < GIBI
    assert small["warnings"] == [] and "R of 224 a Kronecker product" in report.text(small)
    config.hessian.structure = "dense"
    config.mesh.fsdp = 1
    found = planner.run(config, hardware=hardware)
    assert found["lacking"][0].startswith("parameters and projections on a device: 3")
    # Gradients without R take none of its memory.
    config.methods = "grad_cos"
    found = planner.run(config, hardware=hardware, host_memory=GIBI)
    assert found["needs"]["R, its roots and eigenvectors on a host"]["needed"] == 0


@pytest.fixture
def small(tmp_path):
    """A config of a corpus of 30 sentences and one query."""
    c = defaults.get_config()
    sentences, fact = tmp_path / "s.jsonl", tmp_path / "f.jsonl"
    texts = [f"It rains in France {'all day ' * (i % 7)}long." for i in range(30)]
    rows = [{"sentence_id": f"s{i}", "text": t} for i, t in enumerate(texts)]
    sentences.write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = dict(fact_id="f", entity0="France", relation="capital", entity1="Paris")
    asked |= dict(prompt0="The capital of France is", trex_sentences=["s1", "s2", "s4"])
    fact.write_text(json.dumps(asked) + "\n")
    c.data.sentences, c.data.facts = str(sentences), str(fact)
    c.tokenizer.vocab_size, c.model.context = 300, 32
    c.projection.side, c.projection.blocks = 4, 2
    return c


def test_a_real_corpus_is_counted_and_nothing_is_left_in_the_workdir(small, tmp_path):
    found = planner.run(small, str(tmp_path / "w"), hardware=chips.parse("h100"))
    data = corpus.load(small, Workdir(tmp_path / "other"))
    s = found["setting"]
    assert (s["passages"], s["queries"], s["stated"]) == (30, 1, False)
    assert s["tokens"] == int(data.passages.scored.sum())
    assert not (tmp_path / "w").exists()
    assert found["needs"]["stores on disk"]["there"] > 0  # of the disk that it would be on
    shapes = setting.of(small).shapes
    assert sum(B * T * n for (B, T), n in shapes.items()) == pytest.approx(
        s["tokens"] / (1 - s["padding"])
    )
    stages = {x["stage"]: x["operations"] for x in found["stages"]}
    assert "encode queries, factored" in stages and "R, none" not in stages
    # The passages that state a fact are scored once more, for their ranks.
    assert setting.of(small).size.labelled == 3
    methods_there = len(setting.of(small).methods["none"])
    scored = cost.score_operations(s["width"], 33, 1) * methods_there
    assert stages["exact search, none"] == scored


def test_without_hardware_this_machine_is_measured(small, monkeypatch):
    """What is measured is what is told: one call for corrections that take the same time."""
    calls = []

    def encoder_times(encoder, shapes, vocab_size, mesh):
        calls.append([len(one.blocks) for one in encoder.layouts])
        return calibration.EncoderTimes(1.0, {8: 0.25}, 100)

    monkeypatch.setattr(calibration, "encoder_times", encoder_times)
    monkeypatch.setattr(
        calibration, "product_times", lambda *a: calibration.ProductTimes(1e6, 1e5, 1e4)
    )
    found = planner.run(small)
    # The pass of both, and the queries' of either; 2 blocks of layers × attention and MLP.
    assert calls == [[4, 4], [4]]
    shapes = setting.of(small, jax.device_count()).shapes
    positions = sum(B * T * n for (B, T), n in shapes.items())
    stages = {x["stage"]: x for x in found["stages"]}
    encode = stages["encode corpus, factored and none"]
    assert encode["seconds"] == positions * 0.25 + len(shapes)
    assert encode["devices"] == jax.device_count() and found["hardware"]["measured"]
    width, gram = 4 * 16, 2 * 30 * 4 * 16**2
    # grad_cos and grad_dot: no whitening, two products with one query, of 30 passages and of the
    # 3 labelled ones.
    seconds = 2 * 2 * 33 * width / 1e5 / jax.local_device_count()
    assert stages["exact search, none"]["seconds"] == pytest.approx(seconds)
    eigen = 3 * 9 * 4 * 16**3
    assert stages["R, factored"]["seconds"] == pytest.approx(
        gram / 1e6 / jax.local_device_count() + eigen / 1e4
    )
    assert "rates measured here" in report.text(found)


def test_what_cannot_be_is_not_measured(small, monkeypatch):
    monkeypatch.setattr(calibration, "encoder_times", None)
    monkeypatch.setattr(planner, "_memory", lambda: 1000.0)
    found = planner.run(small)
    assert {x["seconds"] for x in found["stages"][1:]} == {None}
    assert len(found["lacking"]) == 4
    assert "–" in report.text(found) and "total" not in report.text(found)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"plan.tokens": 0}, {}, "plan.tokens=0: give all keys of plan, or none"),
        ({"plan.tokens": 10**15}, {}, "plan.tokens=1000000000000000 is more than"),
        ({"methods": "bm25"}, {}, "none of methods=bm25 searches the gradients"),
        ({"mesh.fsdp": 3}, {}, "mesh.fsdp × mesh.tensor = 3 does not divide 128 devices"),
        ({"store.dtype": "int4"}, {}, "unknown dtype 'int4'"),
        ({}, {"mfu": 0.0}, "--mfu=0.0 must be above 0"),
        ({}, {"reading": 0.0, "host_memory": 0.0}, "--reading, --host_memory must be above 0"),
    ],
)
def test_what_makes_no_sense_is_told(changes, arguments, message):
    config = paper_c4.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        planner.run(config, hardware=chips.parse("v5p-256"), **arguments)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("include", [None, "."])
@pytest.mark.parametrize("correction", ["none", "low_rank(3)", "adam"])
def test_operations_are_those_that_the_compiler_counts(correction, include, tied):
    """Within 7%, as the compiler counts what is no product too, and masked pairs of positions."""
    arguments = dict(width=128, layers=2, heads=4, kv_heads=2, head_width=32, ff_width=384)
    arguments |= dict(vocab_size=512, tied=tied)

    def build(scan):
        return lambda: Decoder(DecoderSettings(**arguments, scan=scan), rngs=nnx.Rngs(0))

    # The compiler counts a loop's body once: so the layers are a list.
    model = build(False)()
    scales = calibration.ones(find_sites(model, include), correction)
    encoder = encoders.make_encoder(model, Projection(side=16, blocks=2), scales, include=include)
    batch = {k: np.zeros((4, 128), np.int32) for k in ("tokens", "targets")}
    batch["weights"] = np.ones((4, 128), np.float32)
    counted = encoder.compiled.lower(encoder.arrays, batch, None).cost_analysis()["flops"]
    stacked = nnx.eval_shape(build(True))
    planned = setting.count_model(find_sites(stacked, "."), arguments | {"remat": False})
    taps = setting.count_taps(find_sites(stacked, include), 16, correction, tied)
    assert cost.encoding_operations(planned, [taps], {(4, 128): 1}) == pytest.approx(
        counted, rel=0.07
    )


def test_parameters_that_encoding_holds_are_the_models():
    s = setting.of(paper_c4.get_config())
    taken = sum(site.rows * site.columns * site.stack for site in s.sites)
    ends = sum(64 * (site.rows + site.columns) * site.stack for site in s.sites)
    assert s.held() == 4 * (s.parameters + ends)
    config = paper_c4.get_config()
    config.gradients.correction = "adam"
    assert setting.of(config).held() == 4 * (s.parameters + ends + taken)
    # A pass of two kinds holds what each multiplies by.
    config.methods = "trackstar,grad_cos"
    assert setting.of(config).held() == 4 * (s.parameters + 2 * ends + taken)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300
    )


def test_the_program_needs_no_workdir_and_no_corpus(tmp_path):
    plan_of = ("experiments.plan", "--config=configs/paper_c4.py")
    done = command(*plan_of, "--hardware=v5p-256", f"--json={tmp_path}/new/plan.json")
    assert done.returncode == 0, done.stderr
    assert "87.0 TiB" in done.stdout and max(map(len, done.stdout.splitlines())) <= 110
    written = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert written["disk"]["float32"]["store"] == 365_000_000 * 65_536 * 4
    refused = command(*plan_of, "--hardware=v5p-256", "--disk=50")
    assert refused.returncode == 1 and "87.0 TiB" in refused.stdout
    assert "error: this does not fit\nstores on disk: 87.0 TiB" in refused.stderr
    # The folder comes first: measuring this machine takes minutes.
    (tmp_path / "file").touch()
    nowhere = command(*plan_of, f"--json={tmp_path}/file/plan.json")
    assert nowhere.returncode == 1 and not nowhere.stdout
    assert "is a file; give a directory" in nowhere.stderr
    unknown = command(*plan_of, "--hardware=h300x8")
    assert unknown.returncode == 1 and "error: unknown hardware 'h300x8'" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_other_programs_still_need_a_workdir():
    done = command("experiments.trace", "--config=configs/paper_c4.py")
    assert done.returncode != 0 and "--workdir must have a value" in done.stderr
