"""A judge that is a model of natural language inference, by the `transformers` library."""

import importlib.util
import pathlib

import numpy as np

from tda.evaluation.judge import Claim, Judge, JudgeSettings
from tda.retrieval.dense import identity


class EntailmentError(ValueError):
    """The judge's library or model is missing, or the model does not judge entailment."""


class Entailment(Judge):
    """A model of natural language inference; its config says which kind.

    - An encoder–decoder (T5) reads `premise: … hypothesis: …`, and the score is the probability
      that it answers "1", as google/t5_xxl_true_nli_mixture does (Honovich et al. 2022).
    - A classifier of pairs (MNLI) has labels, one of which begins with "entail": the score is that
      label's probability among all.

    Args:
        settings: model, batch and length.

    Raises:
        EntailmentError: the extra `judge` is not installed, there is no such model, or its config
            names no label of entailment.
    """

    def __init__(self, settings: JudgeSettings):
        if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
            raise EntailmentError(
                "the judge nli needs the extra `judge`: pip install 'tda-jax[judge]'"
            )
        if not settings.model:
            raise EntailmentError(
                "the judge nli needs --config.judge.model: the directory of a model of natural "
                "language inference, or its name on the hub, such as "
                "google/t5_xxl_true_nli_mixture"
            )
        import transformers

        self._settings, self._model = settings, None
        load = self._load
        config = load(transformers.AutoConfig)
        self._is_t5 = config.is_encoder_decoder
        self._label = None if self._is_t5 else _entailment_label(config, settings.model)
        self._tokenizer = load(transformers.AutoTokenizer)
        limits = [self._tokenizer.model_max_length, settings.tokens]
        self._limit = min([*limits, getattr(config, "max_position_embeddings", None) or limits[0]])
        # A model of the hub is downloaded before hours of work; a directory is read when needed.
        if not pathlib.Path(settings.model).is_dir():
            self._open()
        self.identity = f"nli {identity(settings.model)} {self._limit}"

    def _load(self, kind, **options):
        try:
            return kind.from_pretrained(self._settings.model, **options)
        # The library passes on any error of the libraries that it reads files with.
        except Exception as error:
            raise EntailmentError(
                f"cannot load judge.model={self._settings.model!r} ({error}); give the directory "
                "of a model of natural language inference, or its name on the hub"
            ) from error

    def _open(self):
        if self._model is None:
            import transformers

            sequences = transformers.AutoModelForSeq2SeqLM
            kind = sequences if self._is_t5 else transformers.AutoModelForSequenceClassification
            model, loaded = self._load(kind, dtype="auto", output_loading_info=True)
            # The library initialises missing weights at random.
            if missing := sorted(loaded["missing_keys"]):
                raise EntailmentError(
                    f"judge.model={self._settings.model!r} lacks the weights {missing[0]!r} and "
                    f"{len(missing) - 1} others; give a model that was trained for inference"
                )
            self._model = model.eval()
        return self._model

    def score(self, pairs):
        """See `Judge`."""
        import torch

        # Only now: before, the accelerator trains and encodes.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, scores = self._open().to(device), np.zeros(len(pairs), np.float32)
        # Pairs of similar length together, since a batch is padded to its longest pair.
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1].text))
        for first in range(0, len(pairs), self._settings.batch):
            rows = order[first : first + self._settings.batch]
            batch = [pairs[i] for i in rows]
            inputs = self._t5_inputs(batch) if self._is_t5 else self._pair_inputs(batch)
            with torch.inference_mode():
                inputs = inputs.to(model.device)
                log_p = self._t5_log_p(inputs) if self._is_t5 else self._label_log_p(inputs)
                scores[rows] = log_p.float().exp().cpu().numpy()
        return scores

    def _pair_inputs(self, batch: list[tuple[str, Claim]]):
        self._check_room([claim.text for _, claim in batch])
        premises, claims = [p for p, _ in batch], [c.text for _, c in batch]
        cut = dict(truncation="only_first", max_length=self._limit)
        return self._tokenizer(premises, claims, padding=True, return_tensors="pt", **cut)

    def _label_log_p(self, inputs):
        return self._model(**inputs).logits.float().log_softmax(-1)[:, self._label]

    def _t5_inputs(self, batch: list[tuple[str, Claim]]):
        frames = [f"premise:  hypothesis: {claim.text}" for _, claim in batch]
        rooms = self._check_room(frames)
        texts = [
            f"premise: {self._cut(premise, room)} hypothesis: {claim.text}"
            for (premise, claim), room in zip(batch, rooms, strict=True)
        ]
        return self._tokenizer(texts, padding=True, return_tensors="pt")

    def _t5_log_p(self, inputs):
        import torch

        answer = self._tokenizer("1", add_special_tokens=False, return_tensors="pt").input_ids
        answer = answer.to(self._model.device).expand(len(inputs.input_ids), -1)
        start = torch.full_like(answer[:, :1], self._model.config.decoder_start_token_id)
        decoder_ids = torch.cat([start, answer[:, :-1]], dim=1)
        logits = self._model(**inputs, decoder_input_ids=decoder_ids).logits.float()
        return logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0].sum(-1)

    def _check_room(self, frames: list[str]) -> list[int]:
        """Returns how many tokens of a premise fit beside each text.

        Raises:
            EntailmentError: one text leaves no room.
        """
        rooms = [self._limit - len(ids) for ids in self._tokenizer(frames).input_ids]
        # A pair has one or two more separators between its texts.
        if min(rooms) < 3:
            text = frames[int(np.argmin(rooms))]
            raise EntailmentError(
                f"the claim {text[:80]!r}… leaves no room for a premise in {self._limit} tokens; "
                "ask shorter queries, or give a larger --config.judge.tokens if the model allows it"
            )
        return rooms

    def _cut(self, premise: str, room: int) -> str:
        """Returns the first `room` tokens of a premise, as text."""
        ids = self._tokenizer(premise, add_special_tokens=False).input_ids
        return premise if len(ids) <= room else self._tokenizer.decode(ids[:room])


def _entailment_label(config, model: str) -> int:
    """Returns the number of the label that stands for entailment."""
    labels = {int(i): str(name) for i, name in config.id2label.items()}
    matches = [i for i, name in labels.items() if name.casefold().startswith("entail")]
    if len(matches) != 1:
        raise EntailmentError(
            f"judge.model={model!r}: exactly one of its labels ({', '.join(labels.values())}) must "
            "begin with 'entail'; name them in its config.json (id2label), or use another model"
        )
    return matches[0]
