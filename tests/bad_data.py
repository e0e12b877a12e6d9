"""Kinds of bad data: files of pairs and suites whose content cannot be used; how much of it is spoilt is drawn."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input import KINDS, Make, kind

__all__ = ["KINDS"]

Row = dict[str, Any]
FILES = {"pairs.jsonl": "steps.0.data", "harmful.jsonl": "evaluation.suites.harmless"}


def whole(name: str, make: Callable[[random.Random, bytes], bytes], ending: str = ".jsonl") -> Make:
    """Write one of the two files anew, from what it was."""

    def spoil(draw: random.Random, folder: Path) -> list[str]:
        path = (folder / name).with_suffix(ending)
        path.write_bytes(make(draw, (folder / name).read_bytes()))
        return [f"{FILES[name]}={path}"]

    return spoil


def some(name: str, change: Callable[[random.Random, Row], str]) -> Make:
    """Put another line in the place of a third of the rows at least."""

    def spoil(draw: random.Random, folder: Path) -> list[str]:
        lines = (folder / name).read_text().splitlines()
        for place in draw.sample(range(len(lines)), draw.randint(len(lines) // 3, len(lines))):
            lines[place] = change(draw, json.loads(lines[place]))
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8", "surrogatepass")
        return []

    return spoil


def put(**columns: Any) -> Callable[[random.Random, Row], str]:
    """A row with other columns; what is None is taken out."""
    return lambda draw, row: json.dumps({key: value for key, value in (row | columns).items() if value is not None})


def pipe(name: str) -> Make:
    def spoil(draw: random.Random, folder: Path) -> list[str]:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        return []

    return spoil


def endless(name: str) -> Make:
    def spoil(draw: random.Random, folder: Path) -> list[str]:
        (folder / name).unlink()
        (folder / name).symlink_to(draw.choice(["/dev/zero", "/dev/random"]))
        return []

    return spoil


def cut(draw: random.Random, text: bytes) -> bytes:
    packed = gzip.compress(text)
    return packed[: draw.randint(20, len(packed) - 12)]


def turns(*roles: str, **more: Any) -> list[Row]:
    return [{"role": role, "content": f"turn {i}", **more} for i, role in enumerate(roles)]


for name, key in FILES.items():
    kind(f"{name} is a pipe", "neither a regular file nor a folder", pipe(name))
    kind(f"{name} never ends", "neither a regular file nor a folder", endless(name))
    kind(f"{name} is empty", key.partition(".")[0], whole(name, lambda draw, text: b""))
    kind(f"{name} is white", name, whole(name, lambda draw, text: draw.choice([b"\n", b" ", b"\n\n \n"]) * 9))
    kind(f"{name} in UTF-16", name, whole(name, lambda draw, text: text.decode().encode("utf-16")))
    kind(f"{name} of noise", name, whole(name, lambda draw, text: b"\xff" + draw.randbytes(draw.randint(9, 9000))))
    kind(f"{name} that ends too soon", "harmful" if name[0] == "h" else "pairs", whole(name, cut, ".jsonl.gz"))
    kind(f"{name} called gz", name.partition(".")[0], whole(name, lambda draw, text: text, ".jsonl.gz"))
    kind(f"{name} called parquet", name.partition(".")[0], whole(name, lambda draw, text: text, ".parquet"))
    kind(f"{name} is half JSON", name.partition(".")[0], whole(name, lambda draw, text: b'[{"prompt": "a"', ".json"))
    kind(f"{name} is deep JSON", name.partition(".")[0], whole(name, lambda draw, text: b"[" * 99_999, ".json"))
    kind(f"{name}: lists for rows", name, some(name, lambda draw, row: json.dumps([*row.values()])))
    kind(f"{name}: nulls for rows", name, some(name, lambda draw, row: draw.choice(["null", "1", '"x"', "true"])))
    kind(f"{name}: half rows", name, some(name, lambda draw, row: json.dumps(row)[: draw.randint(2, 20)]))
    kind(f"{name}: deep rows", name, some(name, lambda draw, row: '{"prompt": ' + "[" * draw.randint(2000, 99_999)))
    kind(f"{name}: a key twice", name, some(name, lambda draw, row: '{"prompt": "a", ' + json.dumps(row)[1:]))
    kind(f"{name}: half a character", name, some(name, put(prompt="a \ud800")))
    kind(f"{name}: long numbers", name, some(name, lambda d, row: json.dumps(row)[:-1] + f', "n": {"9" * 5000}}}'))
    kind(f"{name}: no prompt", name, some(name, put(prompt=None)))
    kind(f"{name}: a number for the prompt", name, some(name, put(prompt=7)))
    kind(
        f"{name}: an empty prompt",
        name,
        some(name, lambda draw, row: put(prompt=draw.choice(["", " ", "\n"]))(draw, row)),
    )
    kind(f"{name}: prompts of no role", name, some(name, put(prompt=turns("narrator"))))
    kind(f"{name}: prompts that end with an answer", name, some(name, put(prompt=turns("user", "assistant"))))
    kind(
        f"{name}: prompts with pictures",
        name,
        some(name, put(prompt=[{"role": "user", "content": [{"type": "image"}]}])),
    )
pairs = "pairs.jsonl"
for side in ("chosen", "rejected"):
    kind(f"no {side}", pairs, some(pairs, put(**{side: None})))
    kind(f"an empty {side}", pairs, some(pairs, put(**{side: ""})))
    kind(f"a list for {side}", pairs, some(pairs, put(**{side: [1, 2]})))
    kind(f"a {side} that goes on for the user", pairs, some(pairs, put(**{side: "yes\n\nHuman: and then?"})))
    kind(f"a rendered {side}", pairs, some(pairs, put(**{side: "<|im_start|>assistant\nyes<|im_end|>"})))
kind("equal answers", pairs, some(pairs, put(chosen="the same .", rejected="the same .")))
kind("a rendered prompt", pairs, some(pairs, put(prompt="<|im_start|>user\nhow ?<|im_end|>\n<|im_start|>assistant\n")))
kind("dialogues that end with the user", pairs, some(
    pairs, put(prompt=None, chosen=turns("user", "assistant", "user"), rejected=turns("user", "assistant", "user"))
))  # fmt: skip
kind("dialogues that begin otherwise", pairs, some(
    pairs, put(prompt=None, chosen=turns("user", "assistant"), rejected=turns("assistant", "user", "assistant"))
))  # fmt: skip
kind("calls of tools", pairs, some(
    pairs, put(prompt=turns("user", "tool"), chosen=turns("assistant", tool_calls=[{"name": "x"}]))
))  # fmt: skip
