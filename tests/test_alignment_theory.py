"""SACPO's Theorem 1 by exact enumeration, and the production training on a policy small enough to enumerate."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from models.alignment import dpo, fused_head, guards, merge
from models.artifacts import Policy, Reference
from models.errors import BrokenInvariant
from models.policy import weights as policies
from models.recipe import Compute, Step, kl_weight

PROMPTS, ANSWERS = 5, 6
BETAS = [(0.1, 0.25), (0.5, 2.0), (1.0, 3.0)]
"""(β, λ)."""


def tilt(policy: np.ndarray, score: np.ndarray, weight: float) -> np.ndarray:
    """π(y|x) exp(f(x,y)/b), normalised per prompt."""
    logits = np.log(policy) + score / weight
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    return found / found.sum(axis=1, keepdims=True)


def tv(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation, on the worst prompt."""
    return float(np.abs(first - second).sum(axis=1).max() / 2)


def draw(seed: int, prompts: int = PROMPTS, answers: int = ANSWERS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """π_ref with full support, r and g."""
    rng = np.random.default_rng(seed)
    ref = rng.dirichlet(np.ones(answers), prompts) + 1e-3
    return (
        ref / ref.sum(axis=1, keepdims=True),
        rng.normal(size=(prompts, answers)),
        rng.normal(size=(prompts, answers)),
    )


def labels(score: np.ndarray) -> np.ndarray:
    """P(y ≻ y') = σ(f(y) − f(y')), shape (prompts, answers, answers)."""
    return 1 / (1 + np.exp(score[:, None, :] - score[:, :, None]))


def dpo_loss(logits: torch.Tensor, reference: np.ndarray, wins: np.ndarray, weight: float) -> torch.Tensor:
    """Return DPO's population loss over all ordered pairs, from the log-probs that production trains on."""
    n, k = logits.shape
    every = torch.arange(k).repeat(n)
    logps = fused_head.per_token(logits.repeat_interleave(k, 0), every)[0].view(n, k)
    ratio = logps - torch.from_numpy(np.log(reference))
    margin = ratio[:, :, None] - ratio[:, None, :]
    apart = ~torch.eye(k, dtype=torch.bool)
    losses = -torch.from_numpy(wins) * torch.nn.functional.logsigmoid(weight * margin)
    return losses[:, apart].sum() / (n * k * (k - 1) / 2)


def gradient(policy: np.ndarray, reference: np.ndarray, wins: np.ndarray, weight: float) -> tuple[float, float]:
    """Return (loss, largest gradient) of the population loss at a policy."""
    logits = torch.from_numpy(np.log(policy)).requires_grad_()
    loss = dpo_loss(logits, reference, wins, weight)
    loss.backward()
    return loss.item(), logits.grad.abs().max().item()


def optimise(start: np.ndarray, reference: np.ndarray, wins: np.ndarray, weight: float) -> np.ndarray:
    """Minimise the population loss from `start`."""
    logits = torch.from_numpy(np.log(start)).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = dpo_loss(logits, reference, wins, weight)
        loss.backward()
        return loss

    optimiser.step(closure)
    return torch.softmax(logits.detach(), -1).numpy()


@pytest.mark.parametrize(("beta", "lambda_"), BETAS)
@pytest.mark.parametrize("seed", range(3))
def test_two_steps_reach_the_constrained_optimum_in_either_order(seed: int, beta: float, lambda_: float) -> None:
    ref, r, g = draw(seed)
    optimum = tilt(ref, r + lambda_ * g, beta)
    step = kl_weight(beta, lambda_)
    reward = tilt(ref, r, beta)
    assert tv(tilt(reward, g, step), optimum) < 1e-10
    assert tv(tilt(tilt(ref, g, step), r, beta), optimum) < 1e-10
    # Y(x) of eq. 11: a ratio of normalisers
    own = (reward * np.exp(g / step)).sum(axis=1)
    ratio = (ref * np.exp((r + lambda_ * g) / beta)).sum(axis=1) / (ref * np.exp(r / beta)).sum(axis=1)
    assert np.allclose(own, ratio, rtol=1e-12, atol=0)


def test_lambda_zero_is_no_kl_weight_but_a_skipped_step() -> None:
    for lambda_ in (0, -1):
        with pytest.raises(ValueError, match="skips the step"):
            kl_weight(0.1, lambda_)


def test_a_large_lambda_leaves_only_the_safest_answers() -> None:
    ref, r, g = draw(0)
    found = tilt(tilt(ref, r, 0.1), g, kl_weight(0.1, 1e6))
    assert (found.argmax(axis=1) == g.argmax(axis=1)).all() and found.max(axis=1).min() > 1 - 1e-9


def test_offsets_per_prompt_and_common_scales_change_no_policy() -> None:
    ref, r, g = draw(1)
    offset = np.random.default_rng(9).normal(size=(PROMPTS, 1))

    def both(r: np.ndarray, g: np.ndarray, beta: float, lambda_: float) -> np.ndarray:
        return tilt(tilt(ref, r, beta), g, kl_weight(beta, lambda_))

    found = both(r, g, 0.5, 2)
    assert tv(both(r + offset, g - 3 * offset, 0.5, 2), found) < 1e-10
    assert tv(both(7 * r, 7 * g, 3.5, 2), found) < 1e-10
    assert tv(both(r, 4 * g, 0.5, 0.5), found) < 1e-10


@pytest.mark.parametrize(("beta", "lambda_"), BETAS)
def test_step_two_is_stationary_at_the_optimum_only_with_the_right_weight_and_reference(
    beta: float, lambda_: float
) -> None:
    ref, r, g = draw(2)
    reward, optimum, wins = tilt(ref, r, beta), tilt(ref, r + lambda_ * g, beta), labels(g)
    loss, slope = gradient(optimum, reward, wins, kl_weight(beta, lambda_))
    assert slope < 1e-8
    pairs = [wins[:, i, j] for i, j in itertools.combinations(range(ANSWERS), 2)]
    entropy = np.mean([-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in pairs])
    assert loss == pytest.approx(entropy, abs=1e-10)
    for mutant in (beta * lambda_, beta, lambda_ / beta):
        assert gradient(optimum, reward, wins, mutant)[1] > 1e-4
    assert gradient(optimum, ref, wins, kl_weight(beta, lambda_))[1] > 1e-4
    assert gradient(reward, reward, wins, kl_weight(beta, lambda_))[1] > 1e-4


@pytest.mark.parametrize(("beta", "lambda_"), BETAS)
def test_optimising_step_two_reaches_the_optimum_only_with_the_right_weight_and_reference(
    beta: float, lambda_: float
) -> None:
    ref, r, g = draw(3)
    reward, optimum, wins = tilt(ref, r, beta), tilt(ref, r + lambda_ * g, beta), labels(g)
    assert tv(optimise(reward, reward, wins, kl_weight(beta, lambda_)), optimum) < 1e-6
    for mutant in (beta * lambda_, beta, lambda_ / beta):
        assert tv(optimise(reward, reward, wins, mutant), optimum) > 0.05
    assert tv(optimise(reward, ref, wins, kl_weight(beta, lambda_)), optimum) > 0.05


# A policy that can be enumerated and that TRL trains: the next token depends on the last one only.
WORDS = ["<pad>", "<eos>", "p0", "p1", "p2", "a0", "a1", "a2", "a3"]
ASKED, GIVEN = slice(2, 5), slice(5, 9)
NEVER = -40.0
"""Logit of what is never said: exp(−40) is 0 beside 1 in float32, so neither loss nor Adam sees it."""


class TabularConfig(PreTrainedConfig):
    model_type = "sacpo_tabular"


class Tabular(PreTrainedModel, GenerationMixin):
    """Hidden state = one-hot of the last token; the head is the table of logits."""

    config_class = TabularConfig
    base_model_prefix = "body"

    class Body(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=torch.nn.functional.one_hot(input_ids, len(WORDS)).float())

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.body, self.lm_head = self.Body(), torch.nn.Linear(len(WORDS), len(WORDS), bias=False)
        self.post_init()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, labels: object = None, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.body(input_ids).last_hidden_state))


AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
AutoModelForCausalLM.register(TabularConfig, Tabular, exist_ok=True)


def tabular(folder: Path, table: np.ndarray) -> Policy:
    """Save a policy whose answers are distributed as in `table`; every answer is one token and EOS."""
    folder.mkdir()
    model = Tabular(TabularConfig(pad_token_id=0, eos_token_id=1))
    logits = np.full((len(WORDS), len(WORDS)), NEVER)  # row: last token, column: next token
    logits[ASKED, GIVEN] = np.log(table)
    logits[GIVEN, 1] = 0
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.from_numpy(logits.T))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    )  # fmt: skip
    policies.save(model, tokenizer, folder)
    return policies.describe(folder, Policy(path=folder, digest="", name="base", kind="base"))


def table_of(policy: Policy, compute: Compute) -> np.ndarray:
    model, _ = policies.load(policy, compute)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(len(WORDS))[None]).logits[0, ASKED].double()
    return torch.softmax(logits, -1).numpy()[:, GIVEN]


def population(odds: np.ndarray) -> list[tuple[str, str, str]]:
    """Pairs in exact proportion to σ(f − f') for f = log odds: of w + w' comparisons y wins w."""
    return [
        (f"p{x}", f"a{a}", f"a{b}")
        for x, row in enumerate(odds)
        for a, b in itertools.permutations(range(odds.shape[1]), 2)
        for _ in range(row[a] // math.gcd(int(row[a]), int(row[b])))
    ]


REF = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.3, 0.5]])
HELPFUL = np.array([[1, 2, 3, 4], [3, 1, 2, 1], [2, 4, 1, 1]])
HARMLESS = np.array([[4, 3, 1, 1], [1, 2, 1, 3], [1, 1, 4, 2]])
BETA, LAMBDA = 0.8, 2.0
STEP = {"data": "town", "updates": 200, "learning_rate": 0.06, "warmup": 0, "save_every": 1000, "max_grad_norm": 1e6}
Scorer = Callable[[Policy, list[tuple[str, str, str]], Path], Reference]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, compute: Compute, reference_of: Scorer) -> dict[str, Policy]:
    """The two steps of Algorithm 1, trained by the production code on population labels."""
    root = tmp_path_factory.mktemp("tabular")
    found = {"base": tabular(root / "base", REF)}
    plan = [("helpful", "base", HELPFUL, 1.0), ("harmless", "helpful", HARMLESS, LAMBDA)]
    for metric, before, odds, lambda_ in plan:
        pairs = population(odds)
        scored = reference_of(found[before], pairs, root / f"{metric} reference")
        config = Step(metric=metric, batch=len(pairs), **STEP)  # type: ignore[arg-type]
        (root / metric).mkdir()
        found[metric] = dpo.train(
            root / metric, found[before], scored, config.objective(BETA, lambda_), config.training, 0, compute
        )
    return found


def test_production_training_reaches_the_optimum_of_both_steps(steps: dict[str, Policy], compute: Compute) -> None:
    reward = tilt(REF, np.log(HELPFUL), BETA)
    optimum = tilt(REF, np.log(HELPFUL) + LAMBDA * np.log(HARMLESS), BETA)
    assert tv(table_of(steps["base"], compute), REF) < 1e-6
    assert tv(table_of(steps["helpful"], compute), reward) < 1e-3
    assert tv(table_of(steps["harmless"], compute), optimum) < 1e-3
    assert tv(reward, optimum) > 0.2  # it had a way to go


def test_production_training_refuses_the_base_as_reference_of_step_two_and_would_miss_the_optimum(
    steps: dict[str, Policy], compute: Compute, reference_of: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = population(HARMLESS)
    config = Step(metric="harmless", batch=len(pairs), **STEP)  # type: ignore[arg-type]
    wrong = reference_of(steps["base"], pairs, tmp_path / "wrong")
    (tmp_path / "out").mkdir()
    with pytest.raises(BrokenInvariant, match="the reference log-probs are of policy"):
        dpo.train(
            tmp_path / "out", steps["helpful"], wrong, config.objective(BETA, LAMBDA), config.training, 0, compute
        )
    renamed = replace(wrong, policy=steps["helpful"].digest)  # as if the wrong file lay in the right place
    with pytest.raises(BrokenInvariant, match="policy and reference differ"):
        dpo.train(
            tmp_path / "out", steps["helpful"], renamed, config.objective(BETA, LAMBDA), config.training, 0, compute
        )
    monkeypatch.setattr(guards, "TOLERANCE", math.inf)
    missed = dpo.train(
        tmp_path / "out", steps["helpful"], renamed, config.objective(BETA, LAMBDA), config.training, 0, compute
    )
    optimum = tilt(REF, np.log(HELPFUL) + LAMBDA * np.log(HARMLESS), BETA)
    assert tv(table_of(missed, compute), optimum) > 0.1


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_merging_tabular_weights_is_sacpo_at_a_smaller_lambda(q: float, tmp_path: Path, compute: Compute) -> None:
    """P-SACPO is exact for log-linear policies: merge(π_r, π_{r+λg}, q) = π_{r+qλg}."""
    r, g = np.log(HELPFUL), np.log(HARMLESS)
    reward = tabular(tmp_path / "reward", tilt(REF, r, BETA))
    safe = tabular(tmp_path / "safe", tilt(REF, r + LAMBDA * g, BETA))
    (tmp_path / "merged").mkdir()
    merged = table_of(merge.interpolate(tmp_path / "merged", safe, reward, q), compute)
    assert tv(merged, tilt(REF, r + q * LAMBDA * g, BETA)) < 1e-6  # float32 weights
    if q in (0.25, 0.75):  # the weights the other way round, or the probabilities averaged, are other policies
        assert tv(merged, tilt(REF, r + (1 - q) * LAMBDA * g, BETA)) > 0.05
        assert tv(merged, q * table_of(safe, compute) + (1 - q) * table_of(reward, compute)) > 1e-3


def test_a_naive_merge_dilutes_the_reward(tmp_path: Path, compute: Compute) -> None:
    """Averaging two policies trained from the base gives tilt(π_ref, (1−q)/β·r + q/b·g, 1), not the policy of qλ."""
    r, g, b = np.log(HELPFUL), np.log(HARMLESS), kl_weight(BETA, LAMBDA)
    reward = tabular(tmp_path / "reward", tilt(REF, r, BETA))
    alone = tabular(tmp_path / "alone", tilt(REF, g, b))
    for q in (0.25, 0.5, 0.75):
        out = tmp_path / f"{q}"
        out.mkdir()
        naive = table_of(merge.interpolate(out, alone, reward, q), compute)
        assert tv(naive, tilt(REF, (1 - q) / BETA * r + q / b * g, 1)) < 1e-6
        assert tv(naive, tilt(REF, r + q * LAMBDA * g, BETA)) > 0.01
