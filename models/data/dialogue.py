"""Messages in, token ids out: one rule for training, for scoring and for answering.

The prompt is rendered by the chat template with its generation prompt, so that a policy is trained on exactly the
context it will see when it answers. The answer is tokenised by itself and ends with one EOS.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from models.errors import BadPolicy
from models.files.foreign import refuse_if_it_fails

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str
    content: str


class Encoded(NamedTuple):
    """Token ids of one prompt and of its answers."""

    prompt: list[int]
    """Generation prompt included."""
    answers: list[list[int]]
    """Each ends with one EOS."""


def messages(prompt: str | list[Message]) -> list[Message]:
    """Return a prompt as messages; plain text is one turn of the user."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def prompt_texts(tokenizer: "PreTrainedTokenizerBase", prompts: list[list[Message]]) -> list[str]:
    """Return prompts as the policy sees them, generation prompt included.

    Raises:
        BadPolicy: the tokenizer has no chat template.
    """
    return _render(tokenizer, prompts, add_generation_prompt=True)


def rendered(tokenizer: "PreTrainedTokenizerBase", prompt: list[Message], answer: str) -> tuple[str, str, str]:
    """Return the prompt as the policy sees it, prompt and answer as the template writes them, and what is trained on.

    Raises:
        BadPolicy: the template cannot write this dialogue.
    """
    (start,) = _render(tokenizer, [prompt], add_generation_prompt=True)
    (whole,) = _render(tokenizer, [[*prompt, Message(role="assistant", content=answer)]])
    return start, whole, _answer(tokenizer.eos_token, whole, start, answer)


def encode(tokenizer: "PreTrainedTokenizerBase", dialogues: list[tuple[list[Message], list[str]]]) -> list[Encoded]:
    """Return the token ids for each (prompt, answers).

    An answer is what the template writes after the prompt, up to the end of the turn.

    Raises:
        BadPolicy: the template cannot write one of the dialogues.
    """
    prompts = prompt_texts(tokenizer, [prompt for prompt, _ in dialogues])
    whole = _render(tokenizer, [[*p, Message(role="assistant", content=a)] for p, texts in dialogues for a in texts])
    starts = [start for start, (_, texts) in zip(prompts, dialogues, strict=True) for _ in texts]
    plain = [text for _, texts in dialogues for text in texts]
    answers = [_answer(tokenizer.eos_token, *parts) for parts in zip(whole, starts, plain, strict=True)]
    # the template has written the special tokens that belong there, so the tokenizer adds none
    ids = tokenizer(prompts + answers, add_special_tokens=False)["input_ids"] if dialogues else []
    ended = iter([*answer, tokenizer.eos_token_id] for answer in ids[len(prompts) :])
    return [Encoded(list(ids[i]), [next(ended) for _ in texts]) for i, (_, texts) in enumerate(dialogues)]


def encode_each(
    tokenizer: "PreTrainedTokenizerBase", dialogues: list[tuple[list[Message], list[str]]]
) -> list[Encoded | BadPolicy]:
    """Return what `encode` does, and for a dialogue that the chat template refuses, why."""
    # all at once first: a batch is tokenised in one call, and templates refuse rows of few data sets only
    with suppress(BadPolicy):
        return list(encode(tokenizer, dialogues))
    results: list[Encoded | BadPolicy] = []
    for dialogue in dialogues:
        try:
            results += encode(tokenizer, [dialogue])
        except BadPolicy as error:
            results.append(error)
    return results


def _answer(eos: str, whole: str, start: str, plain: str) -> str:
    """Return what is trained on: what the template writes after the prompt, up to its last EOS."""
    # some templates write earlier turns differently as soon as an answer follows; then the plain text is the answer
    text = whole[len(start) :] if whole.startswith(start) else plain
    return text[: text.rindex(eos)] if eos in text else text


def _render(tokenizer: "PreTrainedTokenizerBase", dialogues: list[list[Message]], **options: bool) -> list[str]:
    if not tokenizer.chat_template:
        raise BadPolicy(f"{tokenizer.name_or_path}: the tokenizer has no chat template; give one in the recipe")
    sentence = f"{tokenizer.name_or_path}: the chat template cannot write these messages"
    with refuse_if_it_fails(BadPolicy, sentence, "give another as `template` in the recipe"):
        return list(tokenizer.apply_chat_template(dialogues, tokenize=False, **options)) if dialogues else []
