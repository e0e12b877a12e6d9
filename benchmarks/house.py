"""Measures the house: rooms, circles, dicts, `Any`, parameters, lengths, comments. Prints one Markdown table.

    python benchmarks/house.py              the checkout as it is
    python benchmarks/house.py COMMIT …     each commit in a column beside it, read from git
    python benchmarks/house.py --list       every place that one of the figures counts

What should last of these limits is enforced by tests/test_house.py.
"""

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
STOREYS = ("flows", "tasks", "models")
LOOSE = re.compile(r"\b(dict|Mapping|MutableMapping)\[str, (Any|object)\]")
"""A record whose fields no type checker sees."""
VAGUE = ("told", "given", "said", "asked", "found", "known", "kept", "held", "shown")
"""Participles as names of values (house.md, section 4); the first two have a limit."""
EVENTS = re.compile(r"# (type: ignore|noqa|fmt:|pragma|mypy:)")

Files = dict[str, str]
"""Each file's text by its path from the root."""
Places = dict[str, list[str]]
"""Where each figure was counted: a line of text per place."""


def from_tree() -> Files:
    """Return the sources of the checkout."""
    return {
        str(path.relative_to(ROOT)): path.read_text("utf-8")
        for storey in STOREYS
        for path in sorted((ROOT / storey).rglob("*.py"))
    }


def from_git(commit: str) -> Files:
    """Return the sources of a commit."""
    names = git("ls-tree", "-r", "--name-only", commit, *STOREYS).splitlines()
    return {name: git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def git(*arguments: str) -> str:
    """Return what git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function of a file, methods and inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many parameters a caller sees: `self` and `cls` are not among them."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + sum(
        star is not None for star in (arguments.vararg, arguments.kwarg)
    )


def annotations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every annotation, and of what an alias of a type stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.lineno, ast.unparse(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.lineno, ast.unparse(node.returns)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "cast":
            yield node.lineno, ast.unparse(node.args[0])


def aliases(files: Files) -> set[tuple[str, str]]:
    """Return path and name of each alias of a loose dictionary."""
    found = set()
    for path, text in files.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and LOOSE.search(ast.unparse(node.value)):
                found |= {(path, ast.unparse(target)) for target in node.targets}
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a file imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(files: Files) -> list[str]:
    """Return the groups of files that import each other, by Tarjan's components (small: two at a time would do)."""
    module = {path.removesuffix(".py").replace("/", "."): path for path in files if not path.endswith("__init__.py")}
    arrows = {m: {o for o in imported(ast.parse(files[path])) if o in module and o != m} for m, path in module.items()}
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in arrows[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reach[start] = seen
    return sorted({" ↔ ".join(sorted({m, *(o for o in reach[m] if m in reach[o])})) for m in arrows if m in reach[m]})


def names_bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a file gives a name to: variables, parameters, functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment that a reader reads, not those for a tool."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not EVENTS.match(token.string):
            yield token.start[0], token.string


def places(files: Files) -> Places:
    """Return every place that a figure counts."""
    at: Places = defaultdict(list)
    alias = aliases(files)
    alias_names = {name for _, name in alias}
    for path, text in files.items():
        tree = ast.parse(text)
        known = {name for where, name in alias if where == path} | {
            name.asname or name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
            if name.name in alias_names
        }
        for line, annotation in annotations(tree):
            words = set(re.findall(r"(?<![\w.])\w+", annotation))
            elsewhere = set(re.findall(r"\.(\w+)", annotation))  # `jsonl.Row`
            if LOOSE.search(annotation) or words & known or elsewhere & alias_names:
                at["loose dicts"].append(f"{path}:{line} {annotation}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "Any":
                at["Any"].append(f"{path}:{node.lineno}")
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            ):
                at["broad except"].append(f"{path}:{node.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                broad = {"Exception", "BaseException"} & {*map(ast.unparse, node.args)}
                at["suppress(Exception)"] += [f"{path}:{node.lineno}"] * len(broad)
        for function in functions(tree):
            if (n := parameters(function)) > 7:
                at["above 7 parameters"].append(f"{path}:{function.lineno} {function.name} {n}")
            if (n := (function.end_lineno or 0) - function.lineno + 1) > 80:
                at["functions above 80 lines"].append(f"{path}:{function.lineno} {function.name} {n}")
        for line, name in names_bound(tree):
            if name in VAGUE:
                at[name].append(f"{path}:{line}")
        for number, line in enumerate(text.splitlines(), 1):
            if "# type: ignore" in line:
                at["type: ignore"].append(f"{path}:{number} {line.strip()}")
        at["comments"] += [f"{path}:{line} {comment}" for line, comment in comments(text)]
        if (n := len(text.splitlines())) > 350:
            at["files above 350 lines"].append(f"{path} {n}")
    return at


def row(files: Files) -> dict[str, str]:
    """Return the figures of one state of the house."""
    at = places(files)
    lines = sum(len(text.splitlines()) for text in files.values())
    rooms = Counter(str(Path(path).parent) for path in files if not path.endswith("__init__.py"))
    room, largest = rooms.most_common(1)[0]
    longest = max(files, key=lambda path: len(files[path].splitlines()))
    every = [f for text in files.values() for f in functions(ast.parse(text))]
    function = max(every, key=lambda f: (f.end_lineno or 0) - f.lineno)
    return {
        "files, lines": f"{len(files)}, {lines:,}",
        "largest room, files (≤ 14)": f"{room} {largest}",
        "circles (0)": str(len(circles(files))),
        "annotations with `dict[str, Any]` or an alias of it (≤ 90)": str(len(at["loose dicts"])),
        "`Any` per 100 lines (≤ 0.8)": f"{100 * len(at['Any']) / lines:.2f}",
        "`type: ignore` (≤ 5)": str(len(at["type: ignore"])),
        "functions with more than 7 parameters (0)": str(len(at["above 7 parameters"])),
        "broad `except` (≤ 8)": str(len(at["broad except"])),
        "`suppress(Exception)` (0)": str(len(at["suppress(Exception)"])),
        "longest file, lines (≤ 350)": f"{longest} {len(files[longest].splitlines())}",
        "longest function, lines (≤ 80)": f"{function.name} {(function.end_lineno or 0) - function.lineno + 1}",
        "comments per 100 lines (≥ 3)": f"{100 * len(at['comments']) / lines:.2f}",
        "`told` and `given` as names (≤ 20)": str(len(at["told"]) + len(at["given"])),
        "other participles as names": str(sum(len(at[name]) for name in VAGUE[2:])),
    }


def main() -> None:
    """Print the table, or the places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*")
    parser.add_argument("--list", action="store_true", help="print every place that a figure counts")
    options = parser.parse_args()
    if options.list:
        for figure, lines in places(from_tree()).items():
            if figure != "comments":
                print(f"\n{figure}: {len(lines)}", *lines, sep="\n  ")
        return
    columns = {commit: row(from_git(commit)) for commit in options.commits} | {"now": row(from_tree())}
    print("| figure (limit) | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for figure in columns["now"]:
        print(f"| {figure} | " + " | ".join(column[figure] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
