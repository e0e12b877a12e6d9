"""Look at a base before anything is trained: config, tokenizer, names and shapes of the weights, chat template.

Runs as a process of its own (`python -m models.policy.examination`, started by probe.py) with limits on time and
memory, since all of it comes from elsewhere. Nothing of it is executed: no remote code, no pickle, and templates are
rendered by transformers in its sandbox. The empty model lies on torch's meta device and takes no memory.
"""

import json
import math
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.data import town
from models.errors import BadPolicy
from models.policy import headers, templates
from models.recipe.places import TOWN
from models.recipe.record import flat, shown
from models.words import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

OURS = {
    "attn_implementation": (
        *("eager", "sdpa", "flex_attention", "paged|eager"),
        *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
    ),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""Names in the keys by which a config chooses code → what transformers and torch hold of it. Anything else may be a
compiled kernel (`owner/name`), which transformers has fetched from the hub and runs."""
MEMORY = 4 * 2**30
"""Bytes beyond what the libraries take: a tokenizer of 250,000 tokens needs some hundred MB."""
WHOLE = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Types of weights that were quantised; what is trained are numbers with a fraction."""
BUFFERS = ("inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "position_ids")
"""Ends of names that older versions stored beside the weights, and that are computed anew."""


def main() -> None:
    """Read what to look at from standard input; say where we are, and what was found, in one line of JSON each."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    asked = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_CPU, (asked["cpu"], asked["cpu"] + 1))
    signal.alarm(600)  # whoever asked may have been killed
    _limit()
    for one in asked["wanted"]:
        try:
            if one["judge"]:
                told = judge(one["place"], one["judge"], one["shapes"])
            else:
                told = examine(one["place"], one["template"], one["shapes"])
        except BadPolicy as error:
            print(json.dumps({"bad": " ".join(str(error).split())}), flush=True)
            return
        print(json.dumps(told), flush=True)


def examine(place: str, template: str, shapes: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return what is known of a base: number of parameters, and the share of the town's words that it cannot write.

    Args:
        template: of the recipe; empty means its own.
        shapes: roles of the turns of the prompts that suites will ask it.

    Raises:
        BadPolicy: it cannot be trained; names the file and what to do.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    if place == TOWN:
        tokenizer, parameters, config = town.tokenizer(), -1, None
    else:
        path = Path(place)
        if (path / "adapter_config.json").exists():
            raise BadPolicy(f"{path}: holds an adapter; merge it into its base (peft's merge_and_unload) and save that")
        config = _config(path)
        _say(f"{path}: its weights")
        parameters = _quantised(path, config) if path.suffix == ".gguf" else _weights(path, config, CAUSAL)
        _say(f"{path}: its tokenizer")
        tokenizer = _tokenizer(path)
        _vocabulary(path, tokenizer, config)
    where = tokenizer.name_or_path = "template" if template else _template_file(Path(place))
    if template:
        tokenizer.chat_template = template
    _say(where)
    templates.try_out(tokenizer, shapes)
    return {"parameters": parameters, "town_unknown": _unknown(tokenizer)}


def judge(place: str, writes: str, shapes: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Look at a sequence classifier in the same way; `writes` is `template` if its own one writes what it reads.

    Args:
        shapes: roles of the turns of the prompts that it will read.

    Raises:
        BadPolicy: it cannot judge; names the file and what to do.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    path = Path(place)
    config = _read(path, trained=False)
    if type(config) not in CLASSIFIERS:
        raise BadPolicy(f"{path / 'config.json'}: holds a {config.model_type}, of which there are no classifiers")
    _say(f"{path}: its weights")
    parameters = _weights(path, config, CLASSIFIERS, trained=False)
    _say(f"{path}: its tokenizer")
    tokenizer = _tokenizer(path, trained=False)
    _vocabulary(path, tokenizer, config)
    if writes == "template":
        tokenizer.name_or_path = where = _template_file(path)
        _say(where)
        templates.writes(tokenizer, shapes)
    return {"parameters": parameters}


def _say(where: str) -> None:
    print(json.dumps({"at": where}), flush=True)


def _limit() -> None:
    """From here on take little more memory than the libraries do, and write no file."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


# Config and weights


def _where(path: Path) -> dict[str, Any]:
    """Return how transformers is told to read a folder, or a GGUF file, and nothing else."""
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": path, "local_files_only": True}


def _config(path: Path) -> "PreTrainedConfig":
    """Return the config of a model that continues text, all in one decoder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if path.suffix == ".gguf":
        _say(f"{path}: its header")
        try:
            config = AutoConfig.from_pretrained(**_where(path))
        except Exception as error:  # the reader of a broken file may fail anyhow
            raise BadPolicy(f"{path}: transformers cannot read this GGUF file: {first_line(error)}") from error
        return config
    config = _read(path, trained=True)
    wanted = CAUSAL.get(config.model_type, "")
    held = str((config.architectures or [wanted])[0])
    other = held.lower() != wanted.lower()  # early ones are spelt LLaMAForCausalLM
    if config.is_encoder_decoder or other or (config.model_type in MASKED and not config.is_decoder):
        raise BadPolicy(
            f"{path / 'config.json'}: holds a {held or config.model_type}, which does not continue text; give a causal "
            "language model (…ForCausalLM)"
        )
    return config


def _read(path: Path, trained: bool) -> "PreTrainedConfig":
    from transformers import AutoConfig

    file = path / "config.json"
    _say(str(file))
    _plausible(file, trained)
    try:
        return AutoConfig.from_pretrained(**_where(path))
    except Exception as error:
        why = first_line(error)
        raise BadPolicy(f"{file}: transformers cannot read it: {why}; give a model that it knows") from error


def _plausible(file: Path, trained: bool) -> None:
    """Refuse code of others, quantised weights and impossible sizes before transformers looks at them."""
    told = headers.settings(file)
    if "auto_map" in told:
        raise BadPolicy(
            f"{file}: its auto_map names code of its own, which is not run; if transformers knows the architecture "
            f"({told.get('model_type')}), take auto_map out, else give another model"
        )
    if trained and "quantization_config" in told:
        raise BadPolicy(
            f"{file}: the weights are quantised, and such weights cannot be trained; give the model as it was before"
        )
    stored = len(headers.tensors(file.parent))
    for key, value in flat(told).items():
        ours = next((names for name, names in OURS.items() if name in key), None)
        if ours and value is not None and value not in ours:
            raise BadPolicy(
                f"{file}: {key} is {shown(value)}, which names code of a hub, and such code is not run; take it out"
            )
        if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value < 2**31:
            raise BadPolicy(f"{file}: {key} is {shown(value)}, which no model has; copy the model again")
        if key.endswith(("num_hidden_layers", "n_layer", "n_layers")) and isinstance(value, int) and value > stored:
            raise BadPolicy(f"{file}: {key} is {value}, but only {stored} tensors are stored; copy the model again")


def _weights(path: Path, config: "PreTrainedConfig", models: Any, trained: bool = True) -> int:
    """Let transformers put names and shapes of the weights into an empty model; return the number of parameters.

    Args:
        models: type of config → class of the model.
        trained: the weights must be numbers with a fraction, and all of them must be used.
    """
    import torch

    stored = headers.tensors(path)
    whole = next((name for name, tensor in stored.items() if tensor.dtype in WHOLE and not name.endswith(BUFFERS)), "")
    if whole and not trained:
        return -1  # what a quantised judge needs shows when it is loaded
    if whole:
        raise BadPolicy(
            f"{path}: {whole} holds {stored[whole].dtype}: the weights are quantised, and such weights cannot be "
            "trained; give the model as it was before"
        )
    try:
        empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
        _, report = models[type(config)].from_pretrained(
            None, config=config, state_dict=empty, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # sizes that do not fit each other fail anyhow
        raise BadPolicy(
            f"{path / 'config.json'}: no model can be built of it: {first_line(error)}; copy the model again"
        ) from error
    _compare(path, report if trained else report | {"unexpected_keys": []})
    return sum(math.prod(tensor.shape) for tensor in stored.values())


def _compare(path: Path, report: dict[str, Any]) -> None:
    why = {
        "the weights lack": sorted(report["missing_keys"]),
        "config.json and weights differ in the shape of": sorted(str(told[0]) for told in report["mismatched_keys"]),
        "config.json knows nothing of": sorted(
            name for name in report["unexpected_keys"] if not str(name).endswith(BUFFERS)
        ),
    }
    for said, names in why.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadPolicy(f"{path}: {said} {names[0]}{more}; config.json and weights must be of one model")


def _quantised(path: Path, config: "PreTrainedConfig") -> int:
    """Return the number of parameters of a GGUF file, whose tensors must all be there, inside the file."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    try:
        stored = sum(math.prod(map(int, tensor.shape)) for tensor in GGUFReader(path).tensors)
        with torch.device("meta"):
            wanted = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception as error:
        why = first_line(error)
        raise BadPolicy(f"{path}: this GGUF file is damaged or cut off: {why}; {headers.AGAIN}") from error
    if stored < wanted:
        raise BadPolicy(f"{path}: holds {stored:,} of the {wanted:,} parameters that its settings say; {headers.AGAIN}")
    return int(stored)


# Tokenizer


def _tokenizer(path: Path, trained: bool = True) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    settings = path / "tokenizer_config.json"
    if path.is_dir():
        for file in path.glob("*.json"):
            headers.regular(file)
        if settings.exists() and "auto_map" in headers.settings(settings):
            raise BadPolicy(f"{settings}: its auto_map names code of its own, which is not run; take auto_map out")
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_where(path))
    except Exception as error:
        raise BadPolicy(
            f"{path}: its tokenizer cannot be loaded: {first_line(error)}; put its files (tokenizer.json, …) there"
        ) from error
    if not tokenizer(templates.TURNS[0], add_special_tokens=False)["input_ids"]:
        raise BadPolicy(f"{path}: holds no tokenizer; put the tokenizer's files (tokenizer.json, …) there")
    if trained and tokenizer.eos_token_id is None:
        raise BadPolicy(f"{settings}: names no eos_token, so no answer would end; name one there")
    return tokenizer


def _vocabulary(path: Path, tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> None:
    """Refuse tokens for which the model has no row; to what it makes of a GGUF file transformers may add one."""
    added = {*tokenizer.added_tokens_decoder} - {*tokenizer.all_special_ids} if path.suffix == ".gguf" else set()
    largest, rows = max({*tokenizer.get_vocab().values()} - added), config.get_text_config().vocab_size
    if largest >= rows:
        raise BadPolicy(
            f"{path}: the tokenizer's largest token is number {largest}, the model knows {rows} (vocab_size); both "
            "must be of one model"
        )


def _unknown(tokenizer: "PreTrainedTokenizerBase") -> float:
    """Return the share of the town's words that the tokenizer does not know."""
    words = sorted(set(town.tokenizer().get_vocab()) - set(town.SPECIAL))
    unknown = tokenizer.unk_token_id
    missing = [word for word in words if {*tokenizer(word, add_special_tokens=False)["input_ids"]} <= {unknown}]
    return len(missing) / len(words)


def _template_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path}: its chat template"
    file = path / "chat_template.jinja"
    return str(file if file.exists() else path / "tokenizer_config.json")


if __name__ == "__main__":
    main()
