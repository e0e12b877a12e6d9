"""Kinds of bases and chat templates that cannot be trained: see bad_input.py."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models.data import town
from tests.bad_input import Make, digits, kind

Change = Callable[[random.Random, Path], Any]
"""Spoils the folder of a base."""
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer_config.json"
INDEX = "model.safetensors.index.json"


def classifier(folder: Path) -> None:
    """Write a sequence classifier with a single score."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)


def spoilt(change: Change) -> Make:
    def make(draw: random.Random, folder: Path) -> list[str]:
        change(draw, folder / "base")
        return []

    return make


def base(name: str, said: str, change: Change) -> None:
    kind(f"a base: {name}", said, spoilt(change))


def written(file: str, content: str | bytes) -> Change:
    return lambda draw, base: (base / file).write_bytes(content.encode() if isinstance(content, str) else content)


def noise(file: str) -> Change:
    return lambda draw, base: (base / file).write_bytes(draw.randbytes(draw.randint(9, 5000)))


def settings(file: str, **changes: Any) -> Change:
    """Change some settings, and take out those that are None."""

    def change(draw: random.Random, base: Path) -> None:
        config = json.loads((base / file).read_text()) | changes
        (base / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def config(**changes: Any) -> Change:
    return settings("config.json", **changes)


def replaced(file: str, how: Callable[[Path], Any]) -> Change:
    def change(draw: random.Random, base: Path) -> None:
        (base / file).unlink(missing_ok=True)
        how(base / file)

    return change


def tensors(how: Callable[[random.Random, dict[str, torch.Tensor]], Any]) -> Change:
    def change(draw: random.Random, base: Path) -> None:
        weights = load_file(base / WEIGHTS)
        how(draw, weights)
        save_file(weights, base / WEIGHTS, {"format": "pt"})

    return change


def cut(draw: random.Random, base: Path) -> None:
    whole = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(whole[: draw.randint(1, len(whole) - 1)])


def gone(*files: str) -> Change:
    return lambda draw, base: [(base / file).unlink(missing_ok=True) for file in files]


def other(model_type: str, architecture: str, **also: Any) -> Change:
    return written("config.json", json.dumps({"model_type": model_type, "architectures": [architecture], **also}))


def adapter(draw: random.Random, base: Path) -> None:
    shutil.rmtree(base)
    base.mkdir()
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}')
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, base / "adapter_model.safetensors")


def eight_bits(draw: random.Random, weights: dict[str, torch.Tensor]) -> None:
    name = draw.choice(sorted(name for name in weights if "mlp" in name))
    weights[name] = weights[name].to(torch.int8)


def other_shape(draw: random.Random, weights: dict[str, torch.Tensor]) -> None:
    weights[draw.choice(sorted(weights))] = torch.zeros(3, 5)


def many_digits(draw: random.Random, base: Path) -> None:
    (base / "config.json").write_text(f'{{"vocab_size": {digits(draw)}}}')


def large(file: str, size: int, start: bytes = b"") -> Change:
    """A file of so many bytes, of which hardly any take room on the disk."""

    def change(draw: random.Random, base: Path) -> None:
        (base / file).write_bytes(start)
        os.truncate(base / file, size)

    return change


def header(text: Callable[[], bytes]) -> Change:
    return lambda draw, base: written(WEIGHTS, len(text()).to_bytes(8, "little") + text())(draw, base)


def named(count: int) -> bytes:
    """Return a header that names so many tensors of no size."""
    tensor = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{i}":{tensor}' for i in range(count)) + "}").encode()


MANY = 10 ** random.Random(os.environ["SACPO_SEED"]).randint(10, 30)

# Weights
base("empty weights", "model.safetensors: is empty; copy or download it again", written(WEIGHTS, b""))
base("weights of noise", "model.safetensors: is no safetensors file", noise(WEIGHTS))
base("cut weights", "model.safetensors: ", cut)
base("more bytes than tensors", "bytes of weights where", lambda d, b: (b / WEIGHTS).open("ab").write(b"more"))
base("a header that is a list", "is no safetensors file", written(WEIGHTS, (2).to_bytes(8, "little") + b"[]"))
base("a header without shapes", "is no safetensors", written(WEIGHTS, (14).to_bytes(8, "little") + b'{"a": {"b": 1}'))
base("a header of 2^60 bytes", "is no safetensors", written(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"))
base("250,000 tensors", "model.safetensors: names more than 200,000 tensors", header(lambda: named(250_000)))
base(
    "a header of nothing but brackets",
    "names more than 200,000 tensors",
    header(lambda: b"[" + b"[]," * 10**6 + b"[]]"),
)
base(
    "a header of 20 MiB",
    "has a header of 20,971,520 bytes",
    large(WEIGHTS, 21 * 2**20, (20 * 2**20).to_bytes(8, "little")),
)
base("an index of 40 MB", "is larger than", large(INDEX, 40_000_000))
base("an index of no names", "names the file '[1]'", written(INDEX, '{"weight_map": {"a": [1]}}'))
base("a config of 40 MB", "config.json: is larger than", large("config.json", 40_000_000))
base("weights that are a folder", "is a folder, not a file", replaced(WEIGHTS, Path.mkdir))
base("weights that are a pipe", "is a pipe or device, not a file", replaced(WEIGHTS, os.mkfifo))
base("no weights", "holds no weights in safetensors", gone(WEIGHTS))
base("pickled weights", "no weights in safetensors", lambda d, b: (b / WEIGHTS).rename(b / "pytorch_model.bin"))
base("an index without its files", "names the file 'm-1'", written(INDEX, '{"weight_map": {"a": "m-1"}}'))
base("an index that is no index", "names the file ''", written(INDEX, '{"weight_map": []}'))
base("a tensor too few", "the weights lack", tensors(lambda d, t: t.pop(d.choice(sorted(t)))))
base("a tensor too many", "config.json knows nothing of extra", tensors(lambda d, t: t.update(extra=torch.zeros(2))))
base("a tensor of another shape", "differ in the shape of", tensors(other_shape))
base("weights of eight bits", "the weights are quantised", tensors(eight_bits))
base("an adapter without its base", "holds an adapter", adapter)
base("an adapter beside weights", "holds an adapter", written("adapter_config.json", '{"peft_type": "LORA"}'))

# config.json
base("no config", "config.json: cannot be read", gone("config.json"))
base("a config that is a list", "config.json: holds a list where settings are meant", written("config.json", "[1]"))
base("a config of text", "config.json: is no JSON", written("config.json", "a model"))
base("an empty config", "config.json: is no JSON", written("config.json", ""))
base("a config of noise", "config.json: ", noise("config.json"))
base("a config 100,000 deep", "config.json: is no JSON", written("config.json", "[" * 100_000))
base("a config of 5,000 digits", "config.json: is no JSON", many_digits)
base("a config that is a folder", "config.json: is a folder", replaced("config.json", Path.mkdir))
base("a config that is a pipe", "config.json: is a pipe", replaced("config.json", os.mkfifo))
base("a config that says nothing", "config.json: transformers cannot read it", written("config.json", "{}"))
base("an unknown architecture", "config.json: transformers cannot read it", config(model_type="xyz"))
base("code of its own", "its auto_map names code", config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}))
base("a kernel of a hub", "names code of a hub", config(_attn_implementation="owner/kernel"))
base("a kernel of a revision", "names code of a hub", config(attn_implementation="owner/kernel@v1:attention"))
base("a kernel with a bar", "names code of a hub", config(_attn_implementation="sdpa|owner/kernel"))
base("a kernel for a part", "names code of a hub", config(attn_implementation={"": "sdpa", "text_config": "a/b"}))
base("a kernel of a part", "names code of a hub", config(text_config={"layers": [{"_attn_implementation": "a/b"}]}))
base("a kernel in a list", "names code of a hub", config(attn_implementation=["owner/kernel"]))
base("experts of a hub", "names code of a hub", config(_experts_implementation="sonicmoe"))
base("quantised", "the weights are quantised", config(quantization_config={"quant_method": "gptq", "bits": 4}))
base("BERT", "holds a BertForMaskedLM, which does not continue text", other("bert", "BertForMaskedLM"))
base("BERT with a head", "holds a BertLMHeadModel, which does not", other("bert", "BertLMHeadModel"))
base("RoBERTa", "holds a RobertaForMaskedLM", other("roberta", "RobertaForMaskedLM"))
base("T5", "holds a T5ForConditional", other("t5", "T5ForConditionalGeneration", is_encoder_decoder=True))
base("BART", "holds a BartForConditional", other("bart", "BartForConditionalGeneration", is_encoder_decoder=True))
base("a classifier", "holds a LlamaForSequenceClassification", config(architectures=["LlamaForSequenceClassification"]))
base("a vision model", "holds a ViT", other("vit", "ViTForImageClassification"))
base("a vocabulary of 10^10 or more", "vocab_size is", config(vocab_size=MANY))
base("a width of 10^10 or more", "hidden_size is", config(hidden_size=MANY))
base("10^10 layers or more", "num_hidden_layers is", config(num_hidden_layers=MANY))
base("10^6 layers", "but only 12 tensors are stored", config(num_hidden_layers=10**6))
base("a width of 0", "config.json and weights", config(hidden_size=0))
base("no heads", "config.json: ", config(num_attention_heads=0))
base("a negative width", "hidden_size is -7", config(hidden_size=-7))
base("a width that is text", "config.json: ", config(hidden_size="wide"))
base("a wider model", "differ in the shape of", config(hidden_size=128))
base("a layer more", "the weights lack", config(num_hidden_layers=2))

# Tokenizer
base("a vocabulary smaller than the tokenizer's", "config.json and weights differ", config(vocab_size=50))
base("no tokenizer", "tokenizer", gone("tokenizer.json", "tokenizer_config.json"))
base("a tokenizer of noise", "its tokenizer cannot be loaded", noise("tokenizer.json"))
base("an empty tokenizer", "its tokenizer cannot be loaded", written("tokenizer.json", "{}"))
base("a tokenizer that is a folder", "tokenizer.json: is a folder", replaced("tokenizer.json", Path.mkdir))
base("a tokenizer that is a pipe", "tokenizer.json: is a pipe", replaced("tokenizer.json", os.mkfifo))
base("a tokenizer with code of its own", "its auto_map names code", settings(TOKENIZER, auto_map={"AutoTokenizer": []}))
base("no end of turn", "names no eos_token", settings(TOKENIZER, eos_token=None))
base("no chat template", "holds no chat template", gone("chat_template.jinja"))


def narrow(draw: random.Random, base: Path) -> None:
    """Fewer rows in both config and weights than the tokenizer has tokens."""
    config(vocab_size=50)(draw, base)
    tensors(lambda d, t: t.update({n: v[:50] for n, v in t.items() if "embed" in n or "lm_head" in n}))(draw, base)


TOWNS = ["steps.0.data=town", "data.contaminated=drop"]


def stranger(draw: random.Random, base: Path) -> None:
    """A tokenizer of other words; its unknown token stands for all of the town's."""
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {w if w in town.SPECIAL else f"{w}x": i for w, i in vocabulary.items()}
    (base / "tokenizer.json").write_text(json.dumps(content))


base("a tokenizer larger than the model", "the model knows 50", narrow)
kind("the town's data for other words", "of the town's words", lambda d, f: stranger(d, f / "base") or TOWNS)

# Chat templates, in the recipe or beside the weights
ALL = "{% for m in messages %}{{ m.content }} {% endfor %}"
TEMPLATES = {
    "half a loop": ("is no Jinja", "{% for m in messages %}{{ m.content }}"),
    "half a brace": ("is no Jinja", "{{ messages "),
    "an unknown filter": ("is no Jinja", "{{ messages | shuffle }}"),
    "10,000 brackets": ("is no Jinja", "{{ " + "(" * 10_000 + " }}"),
    "raises": ("cannot write these messages: no", "{{ raise_exception('no') }}"),
    "divides by zero": ("cannot write these messages", ALL + "{{ 1 / 0 }}"),
    "an undefined name": ("cannot write these messages", ALL + "{{ nothing.at.all }}"),
    "includes a file": ("cannot write these messages", ALL + "{% include '/etc/passwd' %}"),
    "reaches for a class": ("reaches for __class__", ALL + "{{ ''.__class__.__mro__ }}"),
    "reaches by a key": ("reaches for __globals__", ALL + "{{ cycler['__globals__'] }}"),
    "reaches for os": ("reaches for os", ALL + "{{ os.system('true') }}"),
    "prints os": ("reaches for os", ALL + "{{ os }}"),
    "drops the answer": ("writes the answer 0 times", ALL.replace("messages", "messages if m.role != 'assistant'")),
    "drops the prompt": ("prompt 0 times", ALL.replace("messages", "messages if m.role != 'user'")),
    "drops earlier turns": ("writes a turn of the prompt 0 times", ALL.replace("messages", "messages[-2:]")),
    "says all twice": ("2 times instead of once", ALL + ALL),
    "says the answer twice": ("answer 2 times", ALL + "{{ messages[-1].content if messages[-1].role == 'assistant' }}"),
    "answers first": ("in another order", ALL.replace("messages", "messages | reverse")),
    "writes nothing": ("writes a turn of the prompt 0 times", "hello"),
    "ends before the answer": ("ends the turn before", ALL.replace("{{", "{{ eos_token if m.role == 'assistant' }}{{")),
    "throws dice": ("differently each time", ALL + "{{ [1, 2, 3] | random }}"),
    "tells the time": ("differently each time", ALL + "{{ strftime_now('%S') }}"),
    "tells an address": ("differently each time", ALL + "{{ messages[0].keys }}"),
    "takes 10 GB": ("cannot write these messages", ALL + "{% set x = 'a' * 10 ** 13 %}"),
}  # fmt: skip
USABLE = {
    "the town's": town.TEMPLATE,
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ALL,
    "one question": "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + ALL,
    "the date": "{{ strftime_now('%d %b %Y') }} " + ALL,
    "thinks first": ALL + "{% if add_generation_prompt %}<think>\n{% endif %}",
    "ends with EOS": "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }} {% endfor %}",
}
SLOW = {
    "never ends": ("does not end within", ALL + 2 * "{% for i in range(99999) %}" + 2 * "{% endfor %}"),
    "a number of 10^9 digits": ("cannot be looked at within", ALL + "{{ 10 ** (10 ** 9) }}"),
}  # fmt: skip


def template(text: str) -> Make:
    def make(draw: random.Random, folder: Path) -> list[str]:
        if draw.random() < 0.5:
            (folder / "base" / "chat_template.jinja").write_text(text)
            return []
        return [f"template={json.dumps(text)}"]

    return make


for name, (said, text) in TEMPLATES.items():
    kind(f"a template: {name}", said, template(text))


# Classifiers as judges
def judge(name: str, said: str, change: Change) -> None:
    def make(draw: random.Random, folder: Path) -> list[str]:
        change(draw, folder / "judge")
        return []

    kind(f"a judge: {name}", said, make)


judge("cut weights", "evaluation.judges.harmless.model", cut)
judge("no tokenizer", "okenizer", gone("tokenizer.json", "tokenizer_config.json"))
judge("a tokenizer of noise", "its tokenizer cannot be loaded", noise("tokenizer.json"))
judge("a tensor too few", "the weights lack", tensors(lambda d, t: t.pop(d.choice(sorted(t)))))
judge("no score", "the weights lack score.weight", tensors(lambda d, t: t.pop("score.weight")))
judge("a tensor of another shape", "differ in the shape of", tensors(other_shape))
judge("code of its own", "its auto_map names code", config(auto_map={"AutoModel": "x.X"}))
judge("a kernel of a hub", "names code of a hub", config(_attn_implementation="owner/kernel"))
judge("10^10 layers or more", "num_hidden_layers is", config(num_hidden_layers=MANY))
judge("a config of 5,000 digits", "no folder with a config.json", many_digits)
judge("a config of 40 MB", "no folder with a config.json", large("config.json", 40_000_000))
judge("a config that is a pipe", "no folder with a config.json", replaced("config.json", os.mkfifo))
judge("a tokenizer's config that is a pipe", "tokenizer_config.json: is a pipe", replaced(TOKENIZER, os.mkfifo))


def small_judge(draw: random.Random, judge: Path) -> None:
    config(vocab_size=50)(draw, judge)
    tensors(lambda d, t: t.update({"model.embed_tokens.weight": torch.zeros(50, 8)}))(draw, judge)


judge("a tokenizer larger than the model", "the model knows 50", small_judge)
