"""A sequence classifier as judge: a reward model, a cost model, or a guard that names classes."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from models.artifacts import content_digest
from models.data.dialogue import Message, messages
from models.errors import BadRecipe
from models.files.hub import local
from models.judges.classifier_tokens import Unwritable, read_as
from models.judges.protocol import SINGLE, Asked, Grade, identity
from models.judges.score_cache import ScoreCache
from models.policy.weights import device_kind, frozen
from models.recipe import Better, Compute, Judge

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Classifier:
    """Scores answers in batches; what it said before is looked up, and then the model is not even loaded."""

    def __init__(
        self, judge: Judge, metric: str, described: dict[str, str], compute: Compute, table: ScoreCache
    ) -> None:
        """Judge as who is `described` (`protocol.identity`), and remember the scores under that name."""
        self.judge, self.metric, self.described, self.compute, self.table = judge, metric, described, compute, table

    def grade(self, answers: Sequence[Asked]) -> Iterator[Grade]:
        """Yield the score of each answer, its sign turned where lower is better; safe from the threshold on."""
        contents = [list(one) for one in answers]
        known = self.table.known(contents)
        missing = {content_digest(c): one for c, one in zip(contents, answers, strict=True)}
        missing = {key: one for key, one in missing.items() if key not in known}
        if missing:
            known |= self._scored(missing)
        sign = 1.0 if self.judge.better is Better.high else -1.0
        for content in contents:
            told = known[content_digest(content)]
            if isinstance(told, str):
                yield Grade(failed=told)
            elif not math.isfinite(told):  # one that overflows would tie with every other, and so lose to none
                yield Grade(failed=f"the score is {told}, no number to compare")
            else:
                score = sign * (told - self.judge.threshold)
                yield Grade(score, score >= 0)

    def _scored(self, missing: dict[str, Asked]) -> dict[str, Any]:
        """Return key → score, or the reason why there is none; scores go to the table batch by batch."""
        import torch

        model, tokenizer = self._load()
        longest = _longest(model, tokenizer)
        ids: dict[str, list[int]] = {}
        told: dict[str, Any] = {}
        for key, one in missing.items():
            turns = [*messages(one.prompt), Message(role="assistant", content=one.answer)]
            try:
                ids[key] = read_as(tokenizer, turns, self.judge.text)
            except Unwritable as error:
                told[key] = str(error)
                continue
            if len(ids[key]) > longest:
                told[key] = f"{len(ids[key])} tokens, the judge reads {longest}"
        order = sorted((key for key in ids if key not in told), key=lambda key: len(ids[key]))
        place, pad = self._place(model), _padding(tokenizer, [row[-1] for row in ids.values() if row])
        model.config.pad_token_id = pad  # a decoder scores the last token that is not padding
        with frozen(model):
            for start in range(0, len(order), self.judge.at_once):
                block = order[start : start + self.judge.at_once]
                width = len(ids[block[-1]])
                rows = [ids[key] + [pad] * (width - len(ids[key])) for key in block]
                mask = [[1] * len(ids[key]) + [0] * (width - len(ids[key])) for key in block]
                logits = model(
                    input_ids=torch.tensor(rows, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                ).logits.float()
                scores = (_probabilities(model, logits)[:, place] if place >= 0 else logits[:, 0]).tolist()
                self.table.add([(list(missing[key]), score) for key, score in zip(block, scores, strict=True)])
                told |= dict(zip(block, scores, strict=True))
        return told

    @property
    def _templated(self) -> bool:
        """The model's own chat template writes its special tokens itself."""
        return not self.judge.text

    def _load(self) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        where = f"evaluation.judges.{self.metric}"
        folder = local(self.judge.model, "model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadRecipe(f"{where}.model {self.judge.model!r}: is no sequence classifier: {why}") from error
        if report["missing_keys"]:
            raise BadRecipe(
                f"{where}.model {self.judge.model!r}: holds no weights for {min(report['missing_keys'])}; its scores "
                "would be random: give a model that was trained as a classifier"
            )
        if self._templated and not tokenizer.chat_template:
            raise BadRecipe(f"{where}.text: the judge has no chat template; say how prompt and answer are written")
        if identity(self.metric, self.judge) != self.described:
            raise BadRecipe(
                f"{where}.model {self.judge.model!r}: changed since the run began; start it again, and name a "
                "revision of what lies on a hub (owner/name@revision)"
            )
        return model.to(device_kind(self.compute.device)), tokenizer

    def _place(self, model: "PreTrainedModel") -> int:
        """Return the number of the class whose probability is the score, or −1 for a single score."""
        labels, wanted = dict(model.config.id2label), self.judge.label
        if not wanted:
            if len(labels) > 1:
                raise BadRecipe(
                    f"evaluation.judges.{self.metric}.label: the judge has the classes {', '.join(labels.values())}; "
                    "name the one whose probability is the score"
                )
            return -1
        found = [i for i, name in labels.items() if wanted in (name, str(i))]
        if not found:
            raise BadRecipe(
                f"evaluation.judges.{self.metric}.label {wanted!r}: the judge has the classes "
                f"{', '.join(labels.values())}"
            )
        if len(labels) == 1:
            raise BadRecipe(f"evaluation.judges.{self.metric}.label {wanted!r}: {SINGLE}")
        return int(found[0])


def _probabilities(model: "PreTrainedModel", logits: "Tensor") -> "Tensor":
    """Return the probability of each class (answers, classes); several may hold at once where the model says so."""
    several = model.config.problem_type == "multi_label_classification"
    return logits.sigmoid() if several else logits.softmax(-1)


def _longest(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many tokens the judge reads; RoBERTa and its kin number positions from their padding on."""
    places = getattr(model.config, "max_position_embeddings", None) or 10**9
    numbering = [part for part in model.modules() if hasattr(part, "position_embeddings")]
    offset = max(
        (part.padding_idx + 1 for part in numbering if getattr(part, "padding_idx", None) is not None), default=0
    )
    return int(min(places - offset, tokenizer.model_max_length))


def _padding(tokenizer: "PreTrainedTokenizerBase", last: list[int]) -> int:
    """Return the tokenizer's padding, or where texts may end with that token, another one."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and pad not in last else min(set(range(len(last) + 1)) - {*last})
