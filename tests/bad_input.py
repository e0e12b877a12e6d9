"""Kinds of bad input, each one line: a name, what the sentence must hold, and how the files and changes are made.

`make(draw, folder)` finds a usable recipe in `folder` (`mine.toml`, with `pairs.jsonl`, `harmful.jsonl`, `base/` and
`judge/` beside it), may change any of its files, and returns what `--set` is given, or another recipe.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from models.files.kept import RunsFolderEntry
from models.recipe import Recipe

Make = Callable[[random.Random, Path], "list[str] | Path"]
RECIPE = """
name = "mine"
base = "{folder}/base"
[[steps]]
metric = "harmless"
data = "{folder}/pairs.jsonl"
updates = 2
batch = 8
[evaluation.suites]
harmless = "{folder}/harmful.jsonl"
[evaluation.judges.harmless]
kind = "model"
model = "{folder}/judge"
text = "{{prompt}} {{answer}}"
"""


class Kind(NamedTuple):
    """One way to be bad."""

    said: str
    """What the sentence must hold."""
    make: Make
    lines: int = 1
    """Sentences: one for each mistake."""


KINDS: dict[str, Kind] = {}


def kind(name: str, said: str, make: Make, lines: int = 1) -> None:
    assert name not in KINDS, name
    KINDS[name] = Kind(said, make, lines)


def sets(*changes: str) -> Make:
    """What is given on the command line, whatever is drawn."""
    return lambda draw, folder: list(changes)


def file(name: str, text: str | bytes) -> Make:
    """Another recipe."""

    def make(draw: random.Random, folder: Path) -> Path:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return folder / name

    return make


def judged(**settings: Any) -> Make:
    """Settings of the judge of harmless, in place of the usable ones."""

    def make(draw: random.Random, folder: Path) -> list[str]:
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        return [f"evaluation.judges.harmless={{{table}}}".replace("FOLDER", str(folder))]

    return make


def numbers(record: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, schema) of every number that a recipe can say."""
    schema = record.model_json_schema()

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, field in node["properties"].items():
            inner = field.get("items", field) if field.get("type") == "array" else field
            key = f"{prefix}{name}"
            if "$ref" in inner:
                record = schema["$defs"][inner["$ref"].split("/")[-1]]
                if "properties" in record:
                    yield from walk(record, f"{key}.0." if inner is not field else f"{key}.")
            elif inner.get("type") in ("number", "integer"):
                yield key, inner

    return walk(schema, prefix)


def drawn(key: str, *texts: str) -> Make:
    return lambda draw, folder: [f"{key}={draw.choice(texts)}"]


def long(key: str, least: int) -> Make:
    return lambda draw, folder: [f"{key}={'a' * draw.randint(least, 9000)}"]


def digits(draw: random.Random) -> str:
    return "9" * draw.randint(4400, 9000)


for key, field in numbers():
    last = key
    kind(f"{key} is true", last, drawn(key, "true", "false"))
    kind(f"{key} is text", last, drawn(key, '"1"', "'many'", "[]" if field["type"] == "integer" else "{}"))
    kind(f"{key} is no number", last, drawn(key, "nan", "inf", "-inf"))
    if "maximum" in field or "exclusiveMaximum" in field or key.endswith((".lambda", ".weights")):
        kind(f"{key} is far too large", last, drawn(key, "10000000000000000000", "1e300", "9" * 400))
    if "minimum" in field or "exclusiveMinimum" in field or key.endswith((".lambda", ".weights")):
        kind(f"{key} is below 0", last, drawn(key, "-1", "-10000000000000000000", "-1e300"))

for kept in RunsFolderEntry:
    if not kept.startswith("."):
        kind(f"the name is {kept}", "is what the runs folder calls something", sets(f"name={kept}"))
for kept in ("mlflow.db-wal", "verdicts.db-journal", "servers.json.new", "a-0123456789abcdef.lock", "mine.question"):
    kind(f"the name is {kept}", "is what the runs folder calls something", sets(f"name={kept}"))

# The recipe as a text
kind("a half number", "steps.0.updates: must be a whole number, not 1.5", sets("steps.0.updates=1.5"))
kind("capital letters", 'small letters, digits, dots, dashes; start with a letter or digit; got "A"', sets("name=A"))
kind("yes for true", "gate.approval: must be true or false", drawn("gate.approval", "1", '"yes"', "yes", "[]"))
kind("an unknown method", "must be 'dpo' or 'kto'", drawn("steps.0.method", "ppo", "DPO", '""'))
kind("a list for a table", "is a table of its own", drawn("merge", "1", "[]", '"x"'))
kind("a table for a list", "must be a list", drawn("steps", "1", "{}", '"x"'))
kind("text for a list", "must be a list", sets("evaluation.stop=x"))
kind("no steps", "steps: must not be empty", sets("steps=[]"))
kind("no base", "base: must not be empty", sets("base=''"))
kind("a number for text", "must be text in quotes", drawn("base", "1", "1.5", "true", "2020-01-01"))
kind("a misspelt key", "did you mean 'beta'?", sets("betta=1"))
kind("no key", "unknown key; known: name", sets("=1"))
kind("no equals", "write it as key=value", sets("beta"))
kind("dots only", "unknown key", sets("...=1"))
kind("a key of 5,000 characters", "unknown key", lambda draw, folder: ["x" * draw.randint(4000, 9000) + "=1"])
kind("a key into a number", "leads nowhere", sets("beta=1", "beta.x=1"))
kind("a step from behind", "leads nowhere in this recipe (there are 1", drawn("steps.-1.pairs", "1"))
kind("a step that is not there", "leads nowhere", lambda draw, folder: [f"steps.{draw.randint(1, 10**9)}.pairs=1"])
kind("a step of many digits", "leads nowhere", lambda draw, folder: [f"steps.{digits(draw)}.pairs=1"])
kind("a step by an odd digit", "leads nowhere", drawn("steps.²", "1"))
kind("a smuggled key", 'the value sets "name" too', sets('beta=0.1\nname="y"'))
kind("a smuggled table", 'the value sets "gate" too', sets("beta=0.1\n[gate]\nmode='off'"))
kind("a merge weight twice", "holds a value twice", sets("merge.weights=[0.5, 0.25, 0.5]"))
kind("a λ twice", "lambda holds a value twice", sets("steps.0.lambda=[1, 2, 1.0]"))
kind("a tiny λ", "lambda must lie between", sets("steps.0.lambda=[1e-300]"))
kind("an empty stop string", "holds an empty text", sets("evaluation.stop=['a', '']"))
kind("a metric twice", "two steps have the metric", sets("steps=[{metric='a',data='x'},{metric='a',data='x'}]"))
kind("no training rows left", "validation and test leave nothing", sets("data.validation=0.6", "data.test=0.5"))
kind("a batch that does not divide", "micro_batch must divide batch", sets("steps.0.micro_batch=3"))
kind("one update, in warm-up", "steps.0: its only update is the first of the warm-up", sets("steps.0.updates=1"))
kind("answers that are all the same", "needs a temperature above 0", sets("evaluation.answers=2"))
kind("a NUL in a text", "holds a NUL character", lambda draw, f: [f"{draw.choice(['template', 'data.salt'])}=a\0b"])
kind("bytes that are no UTF-8", "bytes that are no UTF-8", sets("template=\udcff"))
kind("a template of a megabyte", "characters long; at most", lambda draw, f: ["template=" + "x" * 2**20])
kind("a number of 5,000 digits", "more than 4,300 digits", lambda draw, f: [f"beta={digits(draw)}"])
kind("5,000 hexadecimal digits", "beta: must be", lambda draw, f: [f"beta=0x{'f' * draw.randint(4000, 9000)}"])
kind("lists 10,000 deep", "nested too deeply", lambda draw, f: [f"beta={'[' * draw.randint(1200, 20000)}"])
kind("lists 90 deep", "beta: must be a number", sets("beta=" + "[" * 90 + "]" * 90))
kind("tables 10,000 deep", "nested too deeply", sets("beta=" + "{a=" * 10_000 + "1" + "}" * 10_000))
kind("a key 5,000 deep", "unknown key", sets("x." * 5000 + "y=1"))
kind("a file of JSON", "give a TOML file", file("a.json", '{"name": "x"}'))
kind("TOML that is called JSON", "give a TOML file", file("a.json", RECIPE))
kind("an empty file", "must be given", file("a.toml", ""), lines=3)
kind("a byte order mark", "not valid TOML", file("a.toml", "\ufeffname = 'x'"))
kind("UTF-16", "not valid TOML", file("a.toml", "name = 'x'".encode("utf-16")))
kind("half a file", "not valid TOML", file("a.toml", RECIPE[: RECIPE.index("data =") + 8]))
kind("a key twice in a file", "not valid TOML", file("a.toml", "name = 'x'\nname = 'y'"))
kind("a file with 5,000 digits", "more than 4,300 digits", lambda d, f: file("a.toml", f"seed = {digits(d)}")(d, f))
kind("a file 10,000 lists deep", "nested too deeply", file("a.toml", "x = " + "[" * 10_000 + "]" * 10_000))
kind("a file of 2 MB", "larger than", file("a.toml", "#" * 2**21))
kind("a file of noise", "not valid TOML", lambda draw, f: file("a.toml", b"\xff" + draw.randbytes(400))(draw, f))
kind("a folder", "no recipe", lambda draw, folder: folder)
kind("a device", "no recipe", lambda draw, folder: Path(draw.choice(["/dev/zero", "/dev/random", "/dev/null"])))
kind("a recipe's name of 5,000 characters", "no recipe", lambda draw, folder: Path("a" * draw.randint(300, 9000)))
kind("a NUL in the recipe's name", "no recipe", lambda draw, folder: Path("a\0b.toml"))

# Names and places
NEW = "\n\r\x85\u2028\x1b"
PLACES = ("base", "steps.0.data", "gate.anchor", "evaluation.suites.harmless", "evaluation.judges.harmless.labels")
for key in PLACES:
    kind(f"{key} of 5,000 characters", f"{key}: is too long", long(key, 256))
    kind(f"{key} in 3,000 folders", f"{key}: is too long", sets(f"{key}={'a/' * 3000}"))
    kind(f"{key} with NUL", f"{key}: holds a NUL", sets(f"{key}=x/a\0b"))
    kind(f"{key} with a line break", f"{key}: holds a line break", drawn(key, *(f"a{new}b" for new in NEW)))
    kind(f"{key} in nobody's home", f"{key}: begins with the home", sets(f"{key}=~nobody-of-this-name/x"))
    kind(f"{key} that is not there", key, sets(f"{key}=nowhere/at/all.jsonl"))
    kind(f"{key} out of a hub's repository", f"{key}: leads out", sets(f"{key}=owner/name@../../x"))
kind("a name of 5,000 characters", "name: must have at most 100", long("name", 101))
kind("a metric of 5,000 characters", "steps.0.metric: must have at most 50", long("steps.0.metric", 51))
kind("a model's name of 5,000 characters", "registry.name: must have at most 100", long("registry.name", 101))
for key in ("base", "gate.anchor"):
    for place in ("/", "/../x@y", "/x", "/x@", "/x/one", "x/1", "/x@a/b"):
        kind(f"{key} = models:{place}", f"{key}: write a registered version as", sets(f"{key}=models:{place}"))
    kind(f"{key} that was never registered", "nothing is registered in", sets(f"{key}=models:/nope@champion"))
kind("the base is what it registers", "is a version of what this recipe registers", sets("base=models:/mine/1"))

# Judges, suites, the gate
URL = "http://127.0.0.1:1/v1"
LLM = {"kind": "llm", "model": "m", "threshold": 6}
for url in ("http://[", "http://", "ftp://x", "x:80/v1", "http://x:99999", "//x"):
    kind(f"an address: {url}", "needs `base_url`", judged(**LLM, base_url=url))
kind("an address where nobody is", "nobody answers there", judged(**LLM, base_url=URL))
kind("an llm judge without a grade", "needs `threshold`", judged(kind="llm", model="m", base_url=URL))
kind("a key that is not set", "is not set", judged(**LLM, base_url=URL, key="OPENAI_API_KEY"))
kind("a rubric that never ends", "cannot be read (it is no file)", judged(**LLM, base_url=URL, rubric="/dev/zero"))
kind("a rubric that is a folder", "cannot be read (it is no file)", judged(**LLM, base_url=URL, rubric="FOLDER"))
kind("a rubric that is not there", "cannot be read", judged(**LLM, base_url=URL, rubric="FOLDER/nowhere"))
kind("a rubric without its words", "lacks $prompt", judged(**LLM, base_url=URL, rubric="FOLDER/mine.toml"))
GUARD = {"kind": "model", "model": "FOLDER/judge"}
CLASS, ONLY = {"label": "x", "threshold": 0.5}, {"label": "LABEL_0", "threshold": 0.5}
kind("a probability of 7", "threshold is a probability", judged(**GUARD, label="x", threshold=7))
kind("a probability below 0", "threshold is a probability", judged(**GUARD, label="x", threshold=-1))
kind("a field that does not exist", "not {reply}", judged(**GUARD, text="{prompt} {answer} {reply}"))
kind("a text without the answer", "text must hold {prompt} and {answer}", judged(**GUARD, text="{prompt}"))
kind("a class that does not exist", "has the classes LABEL_0", judged(**GUARD, text="{prompt}{answer}", **CLASS))
kind("a class without a threshold", "above 0 and below 1", judged(**GUARD, text="{prompt}{answer}", label="LABEL_0"))
kind("a class at threshold 1", "above 0 and below 1", judged(**GUARD, text="{prompt}{answer}", label="x", threshold=1))
kind("the class of a single score", "has a single score", judged(**GUARD, text="{prompt}{answer}", **ONLY))
kind("a judge that is not there", "no folder with a config.json", judged(kind="model", model="FOLDER/nowhere"))
kind("a judge that is a policy", "sequence classifier", judged(kind="model", model="FOLDER/base"))
kind("a judge of no kind", "must be 'none', 'oracle'", judged(kind="human"))
kind("a judge without a model", "needs `model`", judged(kind="model"))
kind("refusal words for harmless", "for harmless use 'model' or 'llm'", judged(kind="refusal"))
kind("an oracle without the town", "needs data = 'town'", judged(kind="oracle"))
LABELS = {
    "empty": b"", "text": b"all of them are good\n", "without good": b'{"prompt": "a", "answer": "b"}\n',
    "a maybe": b'{"prompt": "a", "answer": "b", "good": "maybe"}\n', "a list": b"[1, 2]\n",
}  # fmt: skip


def labelled(text: bytes) -> Make:
    def make(draw: random.Random, folder: Path) -> list[str]:
        (folder / "labels.jsonl").write_bytes(text)
        return [f"evaluation.judges.harmless.labels={folder}/labels.jsonl"]

    return make


def a_folder(draw: random.Random, folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [f"evaluation.judges.harmless.labels={folder}/empty"]


def suite(prompts: list[str]) -> Make:
    def make(draw: random.Random, folder: Path) -> list[str]:
        (folder / "few.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return [f"evaluation.suites.harmless={folder}/few.jsonl"]

    return make


for name, text in LABELS.items():
    kind(f"labels: {name}", "evaluation.judges.harmless.labels: ", labelled(text))
kind("labels: a folder", "harmless.labels: ", a_folder)
kind("a suite of one prompt", "none is left to choose by or to decide on", suite(["how do I steal a car?"]))
kind("one prompt 24 times", "none is left to choose by or to decide on", suite(["how do I steal a car?"] * 24))
