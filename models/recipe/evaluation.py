"""The part of a recipe that says how candidates answer and who judges them."""

import re
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from models.recipe.places import Lies, Place
from models.recipe.record import Record, Written, first


class Engine(StrEnum):
    """What generates the answers."""

    transformers = "transformers"
    vllm = "vllm"


class JudgeKind(StrEnum):
    """Who scores the answers to the prompts of one role."""

    none = "none"
    oracle = "oracle"
    model = "model"
    llm = "llm"
    refusal = "refusal"


class Better(StrEnum):
    """Which scores of a reward, cost or guard model are good."""

    high = "high"
    low = "low"


KEY = "SACPO_KEY_"
KEYS = (
    *("ANTHROPIC_API_KEY", "AZURE_OPENAI_API_KEY", "DEEPSEEK_API_KEY", "FIREWORKS_API_KEY", "GEMINI_API_KEY"),
    *("GOOGLE_API_KEY", "GROQ_API_KEY", "HF_TOKEN", "MISTRAL_API_KEY", "NVIDIA_API_KEY", "OPENAI_API_KEY"),
    *("OPENROUTER_API_KEY", "TOGETHER_API_KEY", "VLLM_API_KEY", "XAI_API_KEY"),
)
"""Usual names of variables that hold the key of an address. The value of the variable is sent to the address that the
recipe names, so these and the variables that begin with KEY are the only ones that a recipe may name: a recipe from
elsewhere could else have any secret of the environment sent away."""


def _is_http(address: str) -> bool:
    """Return whether this is a whole address of HTTP: with its scheme, a host, and a valid port if it has one."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # urlsplit and .port raise it
        return False


class Judge(Record):
    """Who scores the answers, and with which words.

    A recipe is stored and shown, so it never holds a key, only the name of the variable that holds it.
    """

    kind: JudgeKind = Field(JudgeKind.none, title="Kind")
    """`oracle`: the town's exact scores. `model`: a sequence classifier (reward, cost, guard). `llm`: a chat model
    behind an OpenAI-compatible address. `refusal`: tells refusals by their words. `none`: no judge."""
    model: Annotated[Written, Lies(lambda judge, _: judge.get("kind") != JudgeKind.llm)] = Field("", title="Model")
    """`model`: folder or hub id (`owner/name@revision`). `llm`: the model's name at the address."""
    text: str = Field("", title="Text for the model")
    """`model`: how prompt and answer are written, for instance `USER: {prompt} ASSISTANT: {answer}`; empty means the
    model's own chat template."""
    label: str = Field("", title="Label")
    """`model`: class whose probability is the score, by name or number; empty means the model has a single score. For
    harmless it needs a `threshold` above 0 and below 1."""
    better: Better = Field(Better.high, title="Better")
    """`model`: `high` for a reward, `low` for a cost or the probability of harm."""
    threshold: float = Field(0.0, title="Threshold")
    """Scores at least this good count as safe (`model`), or from this grade of 1 to 10 on (`llm`, single answers)."""
    base_url: Written = Field("", title="Address")
    """`llm`: address of the endpoint, for instance `http://127.0.0.1:8000/v1`."""
    key: str = Field("", title="Variable with the key")
    """`llm`: name of the environment variable that holds the key, `SACPO_KEY_…` or a usual one as `OPENAI_API_KEY`
    (docs/evidence.md lists them); empty means the endpoint needs none."""
    rubric: Place = Field("", title="Rubric")
    """`llm`: file with your own comparing rubric (docs/evidence.md says what it must hold); empty means ours."""
    repeats: int = Field(1, ge=1, le=100, title="Repeats")
    """`llm`: times that each order of two answers is asked about, from 1 to 100."""
    temperature: float = Field(0.0, ge=0, le=100, title="Temperature")
    """`llm`: sampling temperature of the judge, from 0 to 100."""
    reply_tokens: int = Field(512, ge=0, le=1_048_576, title="Longest reply in tokens")
    """`llm`: the judge's reply is cut here, at most 1,048,576; 0 leaves it to the endpoint."""
    at_once: int = Field(8, ge=1, le=1024, title="At once")
    """Answers in one batch (`model`), or requests in flight (`llm`); from 1 to 1,024."""
    timeout: float = Field(60.0, gt=0, le=86_400, title="Timeout in seconds")
    """`llm`: longest wait for one reply, above 0, at most 86,400 (a day); then it is asked again."""
    retries: int = Field(3, ge=0, le=100, title="Retries")
    """`llm`: times that a call is made again after no reply, 429 or 5xx, with growing waits; from 0 to 100."""
    calls: int = Field(0, ge=0, le=10**12, title="Budget in calls")
    """`llm`: calls that this judge may ever cost in this runs folder, at most 10^12; 0 means no limit."""
    tokens: int = Field(0, ge=0, le=10**15, title="Budget in tokens")
    """`llm`: tokens, read and written, that this judge may ever cost in this runs folder, at most 10^15; 0 means no
    limit."""
    labels: Place = Field("", title="Labelled sample")
    """File of answers that people have judged (prompt, answer, good): tells the judge's own error, and the rate that
    people would have found; empty means none."""
    failures: float = Field(0.05, ge=0, lt=1, title="Failed verdicts allowed")
    """Share of verdicts that may fail, from 0 to below 1; more fails the evaluation."""

    @field_validator("base_url")
    @classmethod
    def _without_password(cls, address: str) -> str:
        if "@" in address.partition("//")[2].partition("/")[0]:
            raise ValueError("must hold no user and no password; name the variable that holds the key in `key`")
        return address

    @field_validator("key")
    @classmethod
    def _of_a_judge(cls, key: str) -> str:
        if key and key not in KEYS and not re.fullmatch(KEY + "[A-Z0-9_]+", key):
            raise ValueError(f"{key!r} is no variable for a judge's key: take {KEY}… or one of {', '.join(KEYS)}")
        return key

    @model_validator(mode="after")
    def _complete(self) -> "Judge":
        if self.kind in (JudgeKind.model, JudgeKind.llm) and not self.model:
            raise ValueError(f"a judge of kind {self.kind} needs `model`")
        if (self.kind is JudgeKind.llm or self.base_url) and not _is_http(self.base_url):
            example = "for instance http://127.0.0.1:8000/v1, with its http:// or https://"
            raise ValueError(f"a judge of kind llm needs `base_url`, {example}")
        if self.text and not ("{prompt}" in self.text and "{answer}" in self.text):
            raise ValueError("text must hold {prompt} and {answer}, for instance 'USER: {prompt} ASSISTANT: {answer}'")
        unknown = {*re.findall(r"{(\w+)}", self.text)} - {"prompt", "answer"}
        if unknown:
            raise ValueError(f"text knows {{prompt}} and {{answer}} only, not {{{min(unknown)}}}")
        if self.kind is JudgeKind.model and self.label and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a probability where `label` is given: from 0 to 1, got {self.threshold:g}")
        return self


class Judges(Record):
    """One judge per role of the prompts."""

    helpful: Judge = Field(Judge(), title="Helpful")
    """Compares answers to helpful prompts."""
    harmless: Judge = Field(Judge(), title="Harmless")
    """Says of answers to harmful prompts, and to incidents that must pass, whether they are safe."""
    over_refusal: Judge = Field(Judge(kind=JudgeKind.refusal), title="Over-refusal")
    """Says whether prompts that only look unsafe were refused."""

    @model_validator(mode="after")
    def _fitting(self) -> "Judges":
        if JudgeKind.refusal in (self.helpful.kind, self.harmless.kind):
            raise ValueError("kind = 'refusal' works for over_refusal only; for harmless use 'model' or 'llm'")
        if self.harmless.kind is JudgeKind.llm and not 1 <= self.harmless.threshold <= 10:
            raise ValueError(
                "an llm judge of harmless needs `threshold`: the grade from 1 to 10 from which on an answer is safe"
            )
        guard = self.harmless
        if guard.kind is JudgeKind.model and guard.label and not 0 < guard.threshold < 1:
            raise ValueError(
                "a judge of harmless with a `label` needs `threshold`: the probability, above 0 and below 1, that "
                f"parts safe from unsafe; at {guard.threshold:g} every answer, or none, would be safe"
            )
        if self.helpful.labels:
            raise ValueError("labels tell good answers from bad; helpful answers are compared, so it takes none")
        if self.over_refusal.kind in (JudgeKind.model, JudgeKind.llm):
            raise ValueError("over_refusal is judged by `refusal` or `oracle`")
        return self


class Suites(Record):
    """Files of prompts to answer: JSON, JSONL or CSV with `prompt` and, optionally, `category`.

    Half of each suite's prompts choose, the other half test, by a hash of the prompt.
    """

    helpful: Place = Field("", title="Helpful")
    """Prompts that deserve help; empty means none."""
    harmless: Place = Field("", title="Harmless")
    """Prompts that invite harm; empty means none."""
    over_refusal: Place = Field("", title="Over-refusal")
    """Prompts that only look unsafe; empty means none."""
    must_pass: Place = Field("", title="Must pass")
    """Prompts of past incidents, each of which must be answered safely; all are asked on both splits."""


class Answering(Record):
    """How candidates answer."""

    max_new_tokens: int = Field(512, ge=1, le=1_048_576, title="Longest answer in tokens")
    """Answers are cut here, from 1 to 1,048,576."""
    temperature: float = Field(0.0, ge=0, le=100, title="Temperature")
    """0 is greedy; above 0, up to 100, samples with noise that depends on the prompt only, for every candidate
    the same."""
    answers: int = Field(1, ge=1, le=1000, title="Answers per prompt")
    """From 1 to 1,000. More than 1 needs a temperature above 0; rates are then means over prompts of the share of good
    answers."""
    stop: list[str] = Field([], max_length=16, title="Stop strings")
    """An answer ends before the first of these, which is not part of it; an empty list means at the end-of-turn
    token only. At most 16, none of them empty."""
    batch: int = Field(64, ge=1, le=65_536, title="Prompts at once")
    """Prompts answered in one batch, sorted by length; from 1 to 65,536."""
    engine: Engine = Field(Engine.transformers, title="Engine")
    """`transformers`, or `vllm`: a vLLM in an environment of its own, whose interpreter SACPO_VLLM_PYTHON names. Each
    keeps its own answers."""

    @field_validator("stop")
    @classmethod
    def _not_at_once(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("holds an empty text, at which every answer would end; take it out")
        return stop

    @model_validator(mode="after")
    def _answers_differ(self) -> "Answering":
        if self.answers > 1 and self.temperature == 0:
            raise ValueError("answers above 1 needs a temperature above 0: greedy answers are all the same")
        return self


class Decoding(Answering):
    """How the answers of one run are drawn: the part of a recipe that the stage of answers depends on."""

    seed: int
    """Seeds the noise of sampled answers, the same for every candidate."""

    def sampled(self) -> "Decoding":
        """Return the settings for KL, which needs samples of the policy itself: one answer at temperature 1, uncut."""
        return self.model_copy(update={"temperature": 1.0, "stop": [], "answers": 1})


class Evaluation(Answering):
    """How candidates answer, which prompts they answer, and who judges them."""

    model_config = first("judges", "suites")  # forms show these before the settings of how candidates answer

    judges: Judges = Field(Judges(), title="Judges")
    """Who scores the answers; without a judge of `harmless` the verdict will be `undecided`."""
    suites: Suites = Field(Suites(), title="Suites")
    """Prompts to answer; the embedded world brings its own."""
    samples: int = Field(16, ge=1, le=1_000_000, title="Sample answers")
    """Without suites: this many held-out prompts per metric are answered, to be read; from 1 to 1,000,000."""
    kl_prompts: int = Field(64, ge=0, le=1_000_000, title="Prompts for KL")
    """Prompts whose sampled answers estimate KL to the base and to the reward-aligned policy; from 0 to 1,000,000."""
    tasks: Annotated[list[Written], Lies(lambda _, task: task.endswith((".yaml", ".yml")))] = Field(
        [], max_length=100, title="Tasks"
    )
    """Tasks of lm-evaluation-harness, by name, or YAML files of your own, at most 100: what alignment cost on them is
    reported."""
    task_limit: int = Field(0, ge=0, le=10**9, title="Items per task")
    """Measure on at most this many items of each task, the first ones; 0 means all, 1,000,000,000 is the most."""

    def decoding(self, seed: int) -> Decoding:
        """Return how answers are drawn; they stay the same when judges or tasks change."""
        return Decoding(**{name: getattr(self, name) for name in Answering.model_fields}, seed=seed)
