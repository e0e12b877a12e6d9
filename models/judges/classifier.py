"""A sequence classifier as judge: a reward model, a cost model, or a guard that names classes."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from models.artifacts import content_digest
from models.data.dialogue import Message, messages
from models.errors import BadRecipe
from models.files.hub import local
from models.judges.classifier_tokens import Unwritable, read_as
from models.judges.protocol import SINGLE, AnsweredPrompt, Grade, identity
from models.judges.score_cache import ScoreCache
from models.policy.weights import device_kind, frozen
from models.recipe import Better, Compute, Judge

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Score = float | str
"""A score, or the reason why there is none."""


class Classifier:
    """Scores answers in batches. Remembered scores are looked up; if all are, the model is not even loaded."""

    def __init__(
        self, judge: Judge, metric: str, described: dict[str, str], compute: Compute, table: ScoreCache
    ) -> None:
        """Take a judge with its name and version (`protocol.identity`), and the table that remembers its scores."""
        self.judge, self.metric, self.described, self.compute, self.table = judge, metric, described, compute, table

    def grade(self, answers: Sequence[AnsweredPrompt]) -> Iterator[Grade]:
        """Yield the score of each answer, its sign turned where lower is better; safe from the threshold on."""
        contents = [list(answer) for answer in answers]
        scores: dict[str, Score] = {
            key: score for key, score in self.table.stored(contents).items() if not isinstance(score, list)
        }
        keyed = {content_digest(content): answer for content, answer in zip(contents, answers, strict=True)}
        missing = {key: answer for key, answer in keyed.items() if key not in scores}
        if missing:
            scores |= self._scored(missing)
        sign = 1.0 if self.judge.better is Better.high else -1.0
        for content in contents:
            score = scores[content_digest(content)]
            if isinstance(score, str):
                yield Grade(failed=score)
            elif not math.isfinite(score):  # a NaN ties with every other score, so it would never lose
                yield Grade(failed=f"the score is {score}, no number to compare")
            else:
                excess = sign * (score - self.judge.threshold)
                yield Grade(excess, excess >= 0)

    def _scored(self, missing: dict[str, AnsweredPrompt]) -> dict[str, Score]:
        """Return key → score, or the reason why there is none; scores go to the table batch by batch."""
        import torch

        model, tokenizer = self._load()
        ids, scores = self._tokens(missing, tokenizer, _longest(model, tokenizer))
        # Answers of similar length share a batch, which needs less padding.
        order = sorted((key for key in ids if key not in scores), key=lambda key: len(ids[key]))
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
                column = _probabilities(model, logits)[:, place] if place >= 0 else logits[:, 0]
                new: dict[str, float] = dict(zip(block, column.tolist(), strict=True))
                self.table.add([(list(missing[key]), score) for key, score in new.items()])
                scores |= new
        return scores

    def _tokens(
        self, answers: dict[str, AnsweredPrompt], tokenizer: "PreTrainedTokenizerBase", longest: int
    ) -> tuple[dict[str, list[int]], dict[str, Score]]:
        """Return key → token ids of all that can be written, and key → why the judge cannot read an answer."""
        ids: dict[str, list[int]] = {}
        reasons: dict[str, Score] = {}
        for key, answer in answers.items():
            turns = [*messages(answer.prompt), Message(role="assistant", content=answer.answer)]
            try:
                ids[key] = read_as(tokenizer, turns, self.judge.text)
            except Unwritable as error:
                reasons[key] = str(error)
                continue
            if len(ids[key]) > longest:
                reasons[key] = f"{len(ids[key])} tokens, the judge reads {longest}"
        return ids, reasons

    @property
    def _templated(self) -> bool:
        """Whether the model's own chat template writes prompt and answer, with the special tokens."""
        return not self.judge.text

    def _load(self) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        """Return model and tokenizer.

        Raises:
            BadRecipe: it is no sequence classifier, lacks weights or a template, or changed since the run began.
        """
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
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadRecipe(f"{where}.model {self.judge.model!r}: is no sequence classifier: {reason}") from error
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
        labels, label = dict(model.config.id2label), self.judge.label
        if not label:
            if len(labels) > 1:
                raise BadRecipe(
                    f"evaluation.judges.{self.metric}.label: the judge has the classes {', '.join(labels.values())}; "
                    "name the one whose probability is the score"
                )
            return -1
        numbers = [i for i, name in labels.items() if label in (name, str(i))]
        if not numbers:
            raise BadRecipe(
                f"evaluation.judges.{self.metric}.label {label!r}: the judge has the classes "
                f"{', '.join(labels.values())}"
            )
        if len(labels) == 1:
            raise BadRecipe(f"evaluation.judges.{self.metric}.label {label!r}: {SINGLE}")
        return int(numbers[0])


def _probabilities(model: "PreTrainedModel", logits: "Tensor") -> "Tensor":
    """Return the probability of each class (answers, classes); several may hold at once where the model says so."""
    independent = model.config.problem_type == "multi_label_classification"
    return logits.sigmoid() if independent else logits.softmax(-1)


def _longest(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many tokens the judge reads.

    RoBERTa and models like it number positions from padding_idx + 1 on, so the first positions hold no token.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9  # none: any length
    embeddings = [module for module in model.modules() if hasattr(module, "position_embeddings")]
    offset = max(
        (module.padding_idx + 1 for module in embeddings if getattr(module, "padding_idx", None) is not None), default=0
    )
    return int(min(positions - offset, tokenizer.model_max_length))


def _padding(tokenizer: "PreTrainedTokenizerBase", last: list[int]) -> int:
    """Return the id of a padding with which no text ends: the tokenizer's own, or else the smallest free one.

    Args:
        last: last id of each text.
    """
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None and pad not in last else min(set(range(len(last) + 1)) - {*last})
