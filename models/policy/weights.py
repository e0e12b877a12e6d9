"""Weights and tokenizer, in and out; every policy is named by a digest of both."""

import ctypes
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic reads no TypedDict of typing before Python 3.12

from models.artifacts import Policy, content_digest, file_digest
from models.data import town
from models.errors import BadPolicy, Damaged
from models.files import sealed
from models.files.foreign import refuse_if_it_fails
from models.files.hub import is_name, local
from models.policy import headers
from models.policy.headers import WEIGHTS
from models.recipe import Compute, Device
from models.recipe.places import TOWN
from models.stage import stage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER = ("tokenizer.json", "chat_template.jinja")
CONFIGS = ("config.json", "generation_config.json")
VOLATILE = ("transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "local_files_only")
"""Settings that say who wrote the file, not what the policy is."""


class _Named(TypedDict):
    """What is read here of the noun in a manifest."""

    name: NotRequired[str]


class _Manifest(TypedDict):
    """What is read here of the manifest of a result."""

    noun: _Named


def device_kind(device: Device) -> str:
    """Return `cpu` or `cuda`.

    Raises:
        BadPolicy: the recipe names cuda and there is none.
    """
    # Importing torch takes seconds, and a command that only looks at a recipe should not wait for it
    if device is Device.cpu or (device is Device.auto and not _has_driver()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device is Device.cuda:
        raise BadPolicy("compute.device is cuda, and torch finds no CUDA device; use auto or cpu")
    return "cpu"


def precision(device: str) -> str:
    """Return in what a device computes: on GPUs weights stay float32, so that small updates are not rounded away."""
    return "float32" if device == "cpu" else "float32 weights, bfloat16 autocast in training"


def _has_driver() -> bool:
    """Return whether torch could find an accelerator: a build for one, and the driver's library."""
    if installed("torch").endswith("+cpu"):
        return False
    for library in ("libcuda.so.1", "libamdhip64.so"):
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    return False


@stage("policy.base", version=1)
def base(out: Path, base: str, template: str, seed: int, sha256: str) -> Policy:
    """Put the base policy into `out`: the untrained town, the dequantised GGUF file, or links to a folder's files.

    Args:
        base: `town`, a `.gguf` file, a folder or a hub id.
        template: chat template; empty means the tokenizer's own.
        sha256: digest that the file or folder had when the run was planned.

    Raises:
        BadPolicy: no such base, an architecture that transformers does not know, or no weights in safetensors.
    """
    place = local(base, "model")
    if base == TOWN:
        tokenizer = town.tokenizer()
        save(town.untrained(seed, tokenizer), tokenizer, out)
    elif place.suffix == ".gguf":
        _dequantise(place, out)
    else:
        _link(place.resolve(), out)
    # Checked after the files were read, so that a change during the reading is found as well
    if base != TOWN and base_digest(base) != sha256:
        raise BadPolicy(f"base {base!r} changed while the run was starting; start again")
    if template:
        (out / "chat_template.jinja").unlink(missing_ok=True)
        (out / "chat_template.jinja").write_text(template, "utf-8")
    return describe(out, Policy(path=out, digest="", name="base", kind="base"))


def display_name(place: str) -> str:
    """Return what a person would call a policy: the name in its manifest if it was made here, else its place."""
    manifest = sealed.read(Path(place).expanduser() / "manifest.json", _Manifest)
    if manifest and (name := manifest["noun"].get("name")):
        return name
    return place.removeprefix("models:/") if place.startswith("models:/") or is_name(place) else Path(place).name


def base_digest(base: str, key: str = "base") -> str:
    """Return what names a base: its content, or the town's version.

    Args:
        base: its place.
        key: how the sentence about a wrong one calls it.

    Raises:
        BadPolicy: no such base, or a folder without weights in safetensors.
    """
    if base == TOWN:
        return f"{TOWN} {town.VERSION}"
    place = located(base, key)
    return digest(place) if place.is_dir() else file_digest(place)


def located(base: str, key: str = "base") -> Path:
    """Return the folder or GGUF file of a base, whose weights are whole as far as their headers tell.

    Args and Raises as in `base_digest`.
    """
    place = local(base, "model")
    try:
        if place.suffix == ".gguf" and place.exists():
            headers.gguf(place)
            return place
        if place.is_dir() and list(place.glob(WEIGHTS)):
            headers.tensors(place)
            return place
    except BadPolicy as error:
        raise BadPolicy(f"{key} {base!r}: {error}") from error
    if (place / "adapter_config.json").exists():
        raise BadPolicy(
            f"{key} {base!r}: holds an adapter without its base; merge both (peft's merge_and_unload) and save that"
        )
    if place.is_dir():
        raise BadPolicy(
            f"{key} {base!r}: the folder holds no weights in safetensors; save the model again as safetensors"
        )
    raise BadPolicy(
        f"{key} {base!r}: no such folder or GGUF file; give a folder, a .gguf file, "
        f"a hub id (owner/name@revision), or `{TOWN}`"
    )


def _link(folder: Path, out: Path) -> None:
    """Link the weights, which may be large, and write the tokenizer as every later step will write it."""
    from transformers import AutoTokenizer

    weights = headers.weights(folder)
    for file in folder.iterdir():
        if file in weights or file.name in (*CONFIGS, "model.safetensors.index.json"):
            (out / file.name).unlink(missing_ok=True)
            (out / file.name).symlink_to(file)
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out)
    except (OSError, ValueError, KeyError) as error:
        raise BadPolicy(f"{str(folder)!r}: its tokenizer cannot be loaded: {error}") from error


def _dequantise(file: Path, out: Path) -> None:
    """Write the weights of a GGUF file in float32: as close to the unquantised policy as the file allows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True}
    with refuse_if_it_fails(BadPolicy, f"base {str(file)!r}: transformers cannot read this GGUF file"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # The weights are plain float32 by now; with these traces transformers would save and load them as quantised
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save(model, tokenizer, out)


def own_eos_ids(folder: Path) -> int | list[int] | None:
    """Return `eos_token_id` of a policy's generation config, or of its config where it has no generation config."""
    for name in reversed(CONFIGS):
        if (folder / name).exists():
            end: int | list[int] | None = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
            return end
    return None


def load(policy: Policy, compute: Compute) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a policy in float32, after checking that its files are the ones its digest names.

    Raises:
        Damaged: the files changed since the policy was made.
        BadPolicy: transformers cannot load the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(policy)
    try:
        model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadPolicy(f"{policy.path}: cannot be loaded as a causal language model: {error}") from error
    return model.to(device_kind(compute.device)), tokenizer


def load_tokenizer(policy: Policy) -> "PreTrainedTokenizerBase":
    """Load a policy's tokenizer, after checking that its files are the ones its digest names.

    Raises:
        Damaged: the files changed since the policy was made.
        BadPolicy: transformers cannot load it.
    """
    intact(policy.path, policy.digest)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(policy.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadPolicy(f"{policy.path}: its tokenizer cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def intact(folder: Path, expected: str) -> None:
    """Check that the files of a policy are the ones that its digest names. To be called before weights are read.

    Raises:
        Damaged: they are not.
    """
    try:
        actual = digest(folder)
    except (OSError, ValueError, BadPolicy):  # a file is missing, or holds no JSON
        actual = "unreadable"
    if actual != expected:
        raise Damaged(folder, actual, expected)


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    """Write weights (safetensors), config and tokenizer to `out`."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def describe(path: Path, policy: Policy) -> Policy:
    """Return the policy with the digests of the files in `path`."""
    return replace(policy, path=path, digest=digest(path), vocabulary=vocabulary_digest(path))


def digest(path: Path) -> str:
    """Return one sha256 over weights, vocabulary, template and configuration of a folder."""
    # By value, not by bytes: a file that another version of transformers writes again is the same configuration
    configuration = {
        name: {key: value for key, value in headers.settings(path / name).items() if key not in VOLATILE}
        for name in (*CONFIGS, "tokenizer_config.json")
        if (path / name).exists()
    }
    return content_digest({**content(path), **configuration})


def content(path: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights, vocabulary and template, by name."""
    files = sorted([*headers.weights(path), *(path / name for name in TOKENIZER if (path / name).exists())])
    return {file.name: file_digest(headers.regular(file)) for file in files}


def vocabulary_digest(path: Path) -> str:
    """Return one sha256 over vocabulary and template only."""
    return content_digest({name: file_digest(path / name) for name in TOKENIZER if (path / name).exists()})


def parameters(path: Path) -> int:
    """Return the number of stored parameters, from the headers of the safetensors files."""
    return sum(math.prod(tensor.shape) for tensor in headers.tensors(path).values())


def project(model: "PreTrainedModel", hidden: "torch.Tensor") -> "torch.Tensor":
    """Return the float32 logits of hidden states, scaled and capped as the architecture does after its output layer.

    Cohere, Granite, Falcon-H1 and Gemma 2 do so in their own forward; `hidden` has shape (…, hidden size).
    """
    logits: torch.Tensor = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config()
    factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    factor = next((f for f in factors if f is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if factor is not None:
        logits = logits * factor
    elif divisor is not None:
        # HyperCLOVA X has the key of Granite, and multiplies
        logits = logits * divisor if config.model_type == "hyperclovax" else logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


@contextmanager
def frozen(model: "PreTrainedModel") -> "Iterator[torch.nn.Module]":
    """Evaluate without dropout and without gradients, then restore the mode."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.train(was_training)
