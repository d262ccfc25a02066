"""Bergson's side of `benchmarks.vs_bergson`, which starts it in Bergson's own environment.

    python bergson_side.py DIRECTORY

One JSON command a line on standard input, one JSON answer a line on standard output. The unchanged
functions behind `bergson build` and `bergson trackstar` do all work, but model, datasets, second
moments and projection matrices are kept from call to call, so that loading them does not count.
"""

import copy
import functools
import importlib
import json
import os
import pathlib
import shutil
import sys
import time

import numpy as np
import torch


def _module(name: str):
    # Bergson's packages give some functions the names of the modules that they are in.
    return importlib.import_module(f"bergson.{name}")


class Clock:
    """Seconds spent in some of Bergson's functions, call by call."""

    def __init__(self):
        self.spent = {}

    def watch(self, module: str, name: str) -> None:
        """Times every call that `module` makes of its function `name`."""
        inner = getattr(_module(module), name)

        @functools.wraps(inner)
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent.setdefault(name, []).append(time.perf_counter() - started)

        setattr(_module(module), name, timed)


class Stopwatch:
    """Seconds since it was made, by the clock and of all cores' work."""

    def __init__(self):
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Returns the sum of both."""
        wall, cpu = self.started
        return {"seconds": time.perf_counter() - wall, "cpu seconds": time.process_time() - cpu}


class Side:
    """Answers commands. Bergson is only imported by the first that needs it."""

    # What costs the same for every corpus: eigenvectors of R, λ and the mixture, R^(−1/2).
    FIXED = (
        ("hessians.autocorrelation", "process_autocorrelation_matrices"),
        ("cli.trackstar", "mix_autocorrelation_matrices"),
        ("builder", "load_preconditioner"),
        ("score.score", "load_preconditioner"),
    )
    STAGES = ("approximate_hessians", "build_query", "score_dataset")

    def __init__(self, directory: str):
        self.directory = pathlib.Path(directory)
        self.setup = json.loads((self.directory / "setup.json").read_text())
        self.clock, self.trained, self.moments = None, None, {}

    def prepare(self) -> dict:
        """Saves the model and the datasets where Bergson reads them; the versions of all there."""
        import bergson
        import datasets
        import tokenizers
        import transformers

        shape, path = self.setup["shape"], self.directory / "model"
        config = transformers.LlamaConfig(
            vocab_size=self.setup["vocabulary"],
            hidden_size=shape["width"],
            intermediate_size=shape["ff_width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            head_dim=shape["head_width"],
            rms_norm_eps=1e-6,
            tie_word_embeddings=self.setup["tied"],
            # Bounds Bergson's batches and nothing else.
            max_position_embeddings=1 << 20,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config)
        with np.load(self.directory / "weights.npz", allow_pickle=False) as kept:
            weights = {k: torch.from_numpy(kept[k]) for k in kept.files}
        left = model.load_state_dict(weights, strict=False)
        missing = set(left.missing_keys) - ({"lm_head.weight"} if self.setup["tied"] else set())
        if missing or left.unexpected_keys:
            raise ValueError(f"the model's weights do not fit: {missing}, {left.unexpected_keys}")
        model.save_pretrained(path)
        # Bergson asks for a tokenizer, though the sequences are token ids already.
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
        tokens = np.load(self.directory / "tokens.npy", allow_pickle=False)
        for name, count in (("corpus", len(tokens)), ("queries", self.setup["queries"])):
            rows = tokens[:count].tolist()
            columns = {"input_ids": rows, "length": [len(r) for r in rows]}
            datasets.Dataset.from_dict(columns).save_to_disk(self.directory / name)
        return {
            "bergson": bergson.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }

    def _start(self) -> None:
        """Replaces Bergson's loading functions by the loaded objects."""
        if self.clock is not None:
            return
        workers = _module("utils.worker_utils")
        load_model, load_data = workers.setup_model_and_peft, workers.setup_data_pipeline
        kept = {}

        def model_and_peft(cfg, *args, **kwargs):
            if "model" not in kept:
                kept["model"] = load_model(cfg, *args, **kwargs)
            return kept["model"]

        def data_pipeline(cfg, data_cfg=None):
            data = data_cfg or cfg.data
            if (data.dataset, data.split) not in kept:
                kept[data.dataset, data.split] = load_data(cfg, data_cfg)
            return kept[data.dataset, data.split]

        def processor(model, cfg, target_modules=None):
            del target_modules
            return workers.processor_for(cfg, self._normalizers(model))

        for name in ("build", "score.score", "hessians.hessian_approximations"):
            _module(name).setup_model_and_peft = model_and_peft
            _module(name).setup_data_pipeline = data_pipeline
            _module(name).create_processor = processor
        collector = _module("collector.collector")
        collector.create_module_projection_matrix = functools.cache(
            collector.create_module_projection_matrix
        )
        self.clock, self.model = Clock(), model_and_peft
        for module, name in self.FIXED:
            self.clock.watch(module, name)
        for name in self.STAGES:
            self.clock.watch("cli.trackstar", name)

    def _second_moments(self) -> dict:
        """Returns the state of Adam or Adafactor for every matrix."""
        if self.correction not in self.moments:
            with np.load(self.directory / "moments.npz", allow_pickle=False) as kept:
                found = {k: torch.from_numpy(kept[k]) for k in kept.files}
            if self.correction == "adam":
                found = {k: {"exp_avg_sq": v} for k, v in found.items()}
            else:
                means = {k: (v.mean(1), v.mean(0)) for k, v in found.items()}
                found = {
                    k: {"exp_avg_sq_row": row, "exp_avg_sq_col": column}
                    for k, (row, column) in means.items()
                }
            self.moments[self.correction] = found
        return self.moments[self.correction]

    def _normalizers(self, model) -> dict:
        """Bergson's own reading of an optimizer's state, of one that lies in memory."""
        if self.correction == "none":
            return {}
        state = enumerate(self._second_moments().items())
        optimizer = {"state": {i: {"param_name": name} | s for i, (name, s) in state}}
        read = _module("utils.load_from_optimizer").get_normalizers
        return read(
            optimizer, {}, None, "", False, self.setup.get("device", "cpu"), "model.", model
        )

    def _config(self, name: str, rows: int, tokens: int):
        config = _module("config.config")
        self.output = self.directory / "bergson" / name
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(f"{self.output}.part", ignore_errors=True)
        return config.IndexConfig(
            run_path=str(self.output),
            model=str(self.directory / "model"),
            data=config.DataConfig(dataset=str(self.directory / "corpus"), split=f"train[:{rows}]"),
            precision=self.setup.get("precision", "fp32"),
            projection_dim=self.setup["side"],
            token_batch_size=tokens,
            overwrite=True,
        )

    def build(self, correction: str, rows: int, tokens: int) -> dict:
        """Runs `bergson build`: an index of raw projected gradients."""
        self._start()
        self.correction, cfg = correction, self._config("index", rows, tokens)
        self.model(cfg)
        _module("build").setup_data_pipeline(cfg)
        watch = Stopwatch()
        _module("build").build(cfg, _module("config.config").PreprocessConfig())
        return watch.read()

    def gradients(self, correction: str, rows: int, tokens: int) -> dict:
        """Rows by the projection matrices of `projections.npz`, put beside it; their columns."""
        self._start()
        with np.load(self.directory / "projections.npz", allow_pickle=False) as kept:
            given = {k: torch.from_numpy(kept[k]) for k in kept.files}

        def ours(name, role, m, n, dtype, device, *_):
            found = given[f"{name}/{role}"].to(device, dtype)
            if found.shape != (m, n):
                raise ValueError(f"{name}/{role} is {tuple(found.shape)}, wanted {(m, n)}")
            return found

        _module("collector.collector").create_module_projection_matrix = ours
        self.build(correction, rows, tokens)
        found = np.asarray(_module("data").load_gradients(self.output), np.float32)
        np.save(self.directory / "rows.npy", found)
        sizes = json.loads((self.output / "info.json").read_text())["grad_sizes"]
        return {"sizes": list(sizes.items())}

    def check_build(self) -> dict:
        """Returns the contents of the last index."""
        import datasets

        rows = np.asarray(_module("data").load_gradients(self.output))
        return {
            "rows": rows.shape[0],
            "width": rows.shape[1],
            "finite": bool(np.isfinite(rows).all()),
            "mean square": float(np.mean(np.square(rows, dtype=np.float64))),
            "loss": float(np.mean(datasets.load_from_disk(self.output / "data.hf")["loss"][:])),
        }

    def trackstar(self, correction: str, rows: int, tokens: int) -> dict:
        """Runs `bergson trackstar`: R of corpus and queries, mixing, query gradients, scores."""
        self._start()
        config = _module("config.config")
        self.correction, cfg = correction, self._config("trackstar", rows, tokens)
        queries = config.QuerySetConfig(dataset=str(self.directory / "queries"), split="train")
        damping = config.InversionConfig(damping_factor=self.setup["damping"])
        trackstar = config.TrackstarConfig(
            query=queries,
            # The paper's scores: R^(−1/2) and unit norm on both sides.
            preprocess_cfg=config.PreprocessConfig(unit_normalize=True, inversion_cfg=damping),
            target_downweight_components=self.setup["component"],
            stats_sample_size=self.setup["hessian_rows"],
        )
        self.model(cfg)
        for data in (cfg.data, queries):
            _module("build").setup_data_pipeline(cfg, data)
        self.clock.spent.clear()
        watch = Stopwatch()
        _module("cli.trackstar").trackstar(cfg, trackstar)
        spent = watch.read()
        parts = dict(self.clock.spent)
        fixed = sum(sum(parts.get(name, ())) for name in {n for _, n in self.FIXED})
        return spent | {"fixed": fixed, "parts": parts}

    def check_trackstar(self) -> dict:
        """Whether all scores are there; how many queries, rows of the corpus, find themselves."""
        scores = np.asarray(_module("data").load_scores(self.output / "scores")[:])
        found = scores.argmax(axis=0) == np.arange(scores.shape[1])
        return {
            "rows": scores.shape[0],
            "queries": scores.shape[1],
            "finite": bool(np.isfinite(scores).all()),
            "found": float(found.mean()),
        }

    def train(self, correction: str, rows: int, tokens: int) -> dict:
        """Takes training steps of the same model in plain PyTorch, a batch of the rows each."""
        del correction
        self._start()
        if self.trained is None:
            loaded, _ = self.model(self._config("index", rows, tokens))
            self.trained = copy.deepcopy(loaded).train().requires_grad_(True)
            self.adam = torch.optim.Adam(self.trained.parameters(), lr=1e-3, fused=True)
        corpus = np.load(self.directory / "tokens.npy", allow_pickle=False)[:rows]
        size = max(1, tokens // corpus.shape[1])
        batches = torch.from_numpy(corpus.astype(np.int64)).split(size)
        watch = Stopwatch()
        for batch in batches:
            self.adam.zero_grad()
            self.trained(input_ids=batch, labels=batch).loss.backward()
            self.adam.step()
        return watch.read()


def main():
    """Serves commands until standard input ends."""
    # Whatever Bergson prints goes where standard error goes; only answers go to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    side = Side(sys.argv[1])
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(side, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
