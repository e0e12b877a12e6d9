"""Kinds of GGUF files that are no base: see bad_input.py."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.bad_bases import ALL
from tests.bad_input import Make, kind


def gguf(content: Callable[[random.Random], bytes]) -> Make:
    def make(draw: random.Random, folder: Path) -> list[str]:
        (folder / "x.gguf").write_bytes(content(draw))
        return [f"base={folder}/x.gguf"]

    return make


def head(version: int, tensors: int = 0, settings: int = 0) -> bytes:
    return b"GGUF" + version.to_bytes(4, "little") + tensors.to_bytes(8, "little") + settings.to_bytes(8, "little")


kind("a GGUF that is empty", "x.gguf: is empty", gguf(lambda draw: b""))
kind("a GGUF of text", "x.gguf: is no GGUF file", gguf(lambda draw: b"weights of a model, all in one text\n"))
kind("a GGUF of noise", "x.gguf: is no GGUF file", gguf(lambda draw: b"\0" + draw.randbytes(999)))
kind("a GGUF that is cut", "x.gguf: is cut off after", gguf(lambda draw: head(3)[: draw.randint(4, 23)]))
kind("a GGUF of another version", "is GGUF of version", gguf(lambda draw: head(draw.choice([0, 1, 4, 99, 2**31]))))
kind("a GGUF of nothing", "transformers cannot read this GGUF", gguf(lambda draw: head(3)))
kind("a GGUF with noise inside", "cannot read this GGUF", gguf(lambda d: head(3, 2**40, 2**40) + d.randbytes(999)))
kind("a GGUF that is a folder", "is a folder, not a file", lambda d, f: (f / "x.gguf").mkdir() or [f"base={f}/x.gguf"])
kind("a GGUF that is a pipe", "is a pipe or device", lambda d, f: os.mkfifo(f / "x.gguf") or [f"base={f}/x.gguf"])


def small_gguf(file: Path, leave_out: str = "") -> None:
    """Write a whole Llama with a tokenizer and a chat template."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(i) if 33 <= i < 127 else f"<{i}>" for i in range(296)), "ab"])
    writer.add_token_types([3, 3, 3] + [1] * 297)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(ALL)
    inside = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    shapes = {f"blk.0.{name}.weight": (16, 16) for name in sorted(inside)}
    shapes |= {"token_embd.weight": (300, 16), "output.weight": (300, 16), "output_norm.weight": (16,)}
    shapes |= {"blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,)}
    for name, shape in shapes.items():
        if name != leave_out:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def half_gguf(draw: random.Random, folder: Path) -> list[str]:
    small_gguf(folder / "x.gguf")
    whole = (folder / "x.gguf").read_bytes()
    (folder / "x.gguf").write_bytes(whole[: draw.randint(25, len(whole) - 20)])
    return [f"base={folder}/x.gguf"]


def lacking_gguf(draw: random.Random, folder: Path) -> list[str]:
    small_gguf(folder / "x.gguf", leave_out="blk.0.ffn_up.weight")
    return [f"base={folder}/x.gguf"]


kind("a GGUF that is cut in the middle", "GGUF file", half_gguf)
kind("a GGUF that lacks a tensor", "holds 11,184 of the 11,440 parameters", lacking_gguf)
