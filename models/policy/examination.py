"""Examine a base before anything is trained: config, tokenizer, names and shapes of the weights, chat template.

Runs as a process of its own (`python -m models.policy.examination`, started by probe.py) with limits on time and
memory, since the files come from elsewhere. Nothing in them is executed: no remote code, no pickle, and templates are
rendered by transformers in its sandbox. The empty model lies on torch's meta device and takes no memory.
"""

import json
import math
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from models.data import town
from models.errors import BadPolicy
from models.files.foreign import refuse_if_it_fails
from models.policy import headers, templates
from models.policy.probe import Findings, Subject
from models.recipe.places import TOWN
from models.recipe.record import flat, short_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IMPLEMENTATIONS = {
    "attn_implementation": (
        *("eager", "sdpa", "flex_attention", "paged|eager"),
        *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
    ),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""Part of the keys by which a config chooses code → the implementations that transformers and torch bring along.
Anything else may be a compiled kernel (`owner/name`), which transformers fetches from the hub and runs."""
MEMORY = 4 * 2**30
"""Bytes beyond what the libraries take: a tokenizer of 250,000 tokens needs some hundred MB."""
WHOLE_NUMBERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Types of tensors that hold quantised weights; only numbers with a fraction can be trained."""
BUFFERS = ("inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "position_ids")
"""Ends of the names of tensors that older versions of transformers stored with the weights; newer ones compute them."""


class LoadingReport(TypedDict):
    """What transformers tells of weights that it has put into a model (`output_loading_info`)."""

    missing_keys: set[str]
    """Names that the model has and the file lacks."""
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, Sequence[int], Sequence[int]]]
    """Name, shape in the file, shape in the model."""


def main() -> None:
    """Read the subjects from standard input; print where the examination is, and its findings, one line of JSON each.

    The first bad subject ends it. Where a limit ends the process, the last line printed tells at which file.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    request = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"] + 1))
    signal.alarm(600)  # the process that started this one ends it earlier, unless it was killed itself
    _limit()
    for entry in request["subjects"]:
        subject = Subject(**entry)
        try:
            if subject.judge:
                findings = judge(subject.place, subject.judge, subject.shapes)
            else:
                findings = examine(subject.place, subject.template, subject.shapes)
        except BadPolicy as error:
            print(json.dumps({"bad": " ".join(str(error).split())}), flush=True)
            return
        print(json.dumps(asdict(findings)), flush=True)


def examine(place: str, template: str, shapes: Sequence[Sequence[str]]) -> Findings:
    """Return the findings on a base.

    Args:
        place: `town`, a folder, or a GGUF file.
        template: of the recipe; empty means the tokenizer's own.
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
        _report_place(f"{path}: its weights")
        parameters = _quantised(path, config) if path.suffix == ".gguf" else _weights(path, config, CAUSAL)
        _report_place(f"{path}: its tokenizer")
        tokenizer = _tokenizer(path)
        _refuse_tokens_without_rows(path, tokenizer, config)
    # The sentence about a bad template begins with this name, and `probe.named_error` looks for `template`
    where = tokenizer.name_or_path = "template" if template else _template_file(Path(place))
    if template:
        tokenizer.chat_template = template
    _report_place(where)
    templates.try_out(tokenizer, shapes)
    return Findings(parameters, _unknown_share(tokenizer))


def judge(place: str, writes: str, shapes: Sequence[Sequence[str]]) -> Findings:
    """Return the findings on a sequence classifier.

    Args:
        place: its folder.
        writes: `template` if its own chat template writes the dialogues that it reads, else `text`.
        shapes: roles of the turns of the prompts that it will read.

    Raises:
        BadPolicy: it cannot judge; names the file and what to do.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    path = Path(place)
    config = _read_config(path, trained=False)
    if type(config) not in CLASSIFIERS:
        raise BadPolicy(f"{path / 'config.json'}: holds a {config.model_type}, of which there are no classifiers")
    _report_place(f"{path}: its weights")
    parameters = _weights(path, config, CLASSIFIERS, trained=False)
    _report_place(f"{path}: its tokenizer")
    tokenizer = _tokenizer(path, trained=False)
    _refuse_tokens_without_rows(path, tokenizer, config)
    if writes == "template":
        tokenizer.name_or_path = where = _template_file(path)
        _report_place(where)
        templates.try_out_judge(tokenizer, shapes)
    return Findings(parameters)


def _report_place(where: str) -> None:
    print(json.dumps({"at": where}), flush=True)


def _limit() -> None:
    """From here on take little more memory than the libraries do, and write no file."""
    # RLIMIT_AS counts reserved addresses, of which the imported libraries take the most, so it is set relative to them
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _source(path: Path) -> dict[str, Path | str | bool]:
    """Return the arguments of `from_pretrained` for a folder or a GGUF file; it may read nothing else."""
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    return {"pretrained_model_name_or_path": path, "local_files_only": True}


def _config(path: Path) -> "PreTrainedConfig":
    """Return the config of a model that continues text, all in one decoder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if path.suffix == ".gguf":
        _report_place(f"{path}: its header")
        with refuse_if_it_fails(BadPolicy, f"{path}: transformers cannot read this GGUF file"):
            config = AutoConfig.from_pretrained(**_source(path))
        return config
    config = _read_config(path, trained=True)
    causal = CAUSAL.get(config.model_type, "")
    architecture = str((config.architectures or [causal])[0])
    other = architecture.lower() != causal.lower()  # early configs spell it LLaMAForCausalLM
    # BERT and its like have a class of causal models as well, but their weights were trained to see both sides
    if config.is_encoder_decoder or other or (config.model_type in MASKED and not config.is_decoder):
        raise BadPolicy(
            f"{path / 'config.json'}: holds a {architecture or config.model_type}, which does not continue text; give "
            "a causal language model (…ForCausalLM)"
        )
    return config


def _read_config(path: Path, trained: bool) -> "PreTrainedConfig":
    from transformers import AutoConfig

    file = path / "config.json"
    _report_place(str(file))
    _refuse_settings(file, trained)
    with refuse_if_it_fails(BadPolicy, f"{file}: transformers cannot read it", "give a model that it knows"):
        config = AutoConfig.from_pretrained(**_source(path))
    return config


def _refuse_settings(file: Path, trained: bool) -> None:
    """Refuse code of others, quantised weights and impossible sizes before transformers looks at them."""
    settings = headers.settings(file)
    if "auto_map" in settings:
        raise BadPolicy(
            f"{file}: its auto_map names code of its own, which is not run; if transformers knows the architecture "
            f"({settings.get('model_type')}), take auto_map out, else give another model"
        )
    if trained and "quantization_config" in settings:
        raise BadPolicy(
            f"{file}: the weights are quantised, and such weights cannot be trained; give the model as it was before"
        )
    stored = len(headers.tensors(file.parent))
    # The settings are flat, since the config of a part (`text_config.layers.0._attn_implementation`) chooses code too
    for key, value in flat(settings).items():
        allowed = next((names for name, names in IMPLEMENTATIONS.items() if name in key), None)
        if allowed and value is not None and value not in allowed:
            raise BadPolicy(
                f"{file}: {key} is {short_json(value)}, which names code of a hub, and such code is not run; "
                "take it out"
            )
        if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value < 2**31:
            raise BadPolicy(f"{file}: {key} is {short_json(value)}, which no model has; copy the model again")
        # Each layer is an object even in an empty model, so a million of them would take all memory and time
        if key.endswith(("num_hidden_layers", "n_layer", "n_layers")) and isinstance(value, int) and value > stored:
            raise BadPolicy(f"{file}: {key} is {value}, but only {stored} tensors are stored; copy the model again")


def _weights(
    path: Path,
    config: "PreTrainedConfig",
    models: "Mapping[type[PreTrainedConfig], type[PreTrainedModel]]",
    trained: bool = True,
) -> int:
    """Let transformers put names and shapes of the weights into an empty model; return the number of parameters.

    Args:
        models: type of config → class of the model.
        trained: the weights must be numbers with a fraction, and all of them must be used.
    """
    import torch

    stored = headers.tensors(path)
    quantised = [n for n, tensor in stored.items() if tensor.dtype in WHOLE_NUMBERS and not n.endswith(BUFFERS)]
    if quantised and not trained:
        return -1  # a judge may be quantised; whether its quantiser can load it shows when it is loaded
    if quantised:
        raise BadPolicy(
            f"{path}: {quantised[0]} holds {stored[quantised[0]].dtype}: the weights are quantised, and such weights "
            "cannot be trained; give the model as it was before"
        )
    # Sizes in the config that do not fit each other fail when the model is built of them. Shapes that do not fit
    # those of the weights must not fail here: `report` names them all
    with refuse_if_it_fails(BadPolicy, f"{path / 'config.json'}: no model can be built of it", "copy the model again"):
        empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
        _, report = models[type(config)].from_pretrained(
            None, config=config, state_dict=empty, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    _refuse_differences(path, report, trained)
    return sum(math.prod(tensor.shape) for tensor in stored.values())


def _refuse_differences(path: Path, report: LoadingReport, trained: bool) -> None:
    """Refuse weights that are not those of the config's model; a judge may hold more than it uses."""
    unexpected = report["unexpected_keys"] if trained else ()
    differences = {
        "the weights lack": sorted(report["missing_keys"]),
        "config.json and weights differ in the shape of": sorted(str(name) for name, *_ in report["mismatched_keys"]),
        "config.json knows nothing of": sorted(name for name in unexpected if not str(name).endswith(BUFFERS)),
    }
    for sentence, names in differences.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadPolicy(f"{path}: {sentence} {names[0]}{more}; config.json and weights must be of one model")


def _quantised(path: Path, config: "PreTrainedConfig") -> int:
    """Return the number of parameters of a GGUF file, whose tensors must all be there, inside the file."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    with refuse_if_it_fails(BadPolicy, f"{path}: this GGUF file is damaged or cut off", headers.AGAIN):
        stored = sum(math.prod(map(int, tensor.shape)) for tensor in GGUFReader(path).tensors)
        with torch.device("meta"):
            needed = AutoModelForCausalLM.from_config(config).num_parameters()
    # More is no damage: a file may hold tensors that transformers does not use
    if stored < needed:
        raise BadPolicy(f"{path}: holds {stored:,} of the {needed:,} parameters that its settings say; {headers.AGAIN}")
    return int(stored)


def _tokenizer(path: Path, trained: bool = True) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    settings = path / "tokenizer_config.json"
    if path.is_dir():
        for file in path.glob("*.json"):
            headers.regular(file)
        if settings.exists() and "auto_map" in headers.settings(settings):
            raise BadPolicy(f"{settings}: its auto_map names code of its own, which is not run; take auto_map out")
    with refuse_if_it_fails(
        BadPolicy, f"{path}: its tokenizer cannot be loaded", "put its files (tokenizer.json, …) there"
    ):
        tokenizer = AutoTokenizer.from_pretrained(**_source(path))
    # A tokenizer may load and yet know no token, as where its files are not there
    if not tokenizer(templates.TURNS[0], add_special_tokens=False)["input_ids"]:
        raise BadPolicy(f"{path}: holds no tokenizer; put the tokenizer's files (tokenizer.json, …) there")
    if trained and tokenizer.eos_token_id is None:
        raise BadPolicy(f"{settings}: names no eos_token, so no answer would end; name one there")
    return tokenizer


def _refuse_tokens_without_rows(path: Path, tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> None:
    """Refuse a tokenizer that has tokens for which the model has no row in its embedding."""
    # for a GGUF file transformers may add a token to the tokenizer, which the file does not have
    added = {*tokenizer.added_tokens_decoder} - {*tokenizer.all_special_ids} if path.suffix == ".gguf" else set()
    largest, rows = max({*tokenizer.get_vocab().values()} - added), config.get_text_config().vocab_size
    if largest >= rows:
        raise BadPolicy(
            f"{path}: the tokenizer's largest token is number {largest}, the model knows {rows} (vocab_size); both "
            "must be of one model"
        )


def _unknown_share(tokenizer: "PreTrainedTokenizerBase") -> float:
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
