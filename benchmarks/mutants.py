"""Which small changes of the code that decides no test notices.

    python benchmarks/mutants.py [--again] [--since COMMIT] [FILE …]

mutmut (`pip install --constraint constraints.txt '.[dev,mutation]'`) changes one thing at a time: an operator, a
number, a word, an argument. Every mutant of WHOLE is tried, and a seeded sample of those of SAMPLED, each with the
tests that call its function (`[tool.mutmut]` in pyproject.toml lists the files). Results are kept in `mutants/`: what
was decided there is not tried again, unless its function changed; `--again` tries those that survived once more, with
the tests that have come since; `--since` tries only functions that are not as they were in a commit. `mutmut show NAME`
shows one.
"""

import argparse
import ast
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.mutation import file_mutation
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir

WHOLE = (
    "models/gate/gate.py",
    "models/gate/facts.py",
    "models/metrics/statistics.py",
    "models/metrics/length_control.py",
    "tasks/tracking/ledger.py",
    "tasks/tracking/ledger_tables.py",
    "models/metrics/figures.py",
    "models/metrics/candidate.py",
)
SAMPLED = ("models/alignment/merge.py", *(f"models/alignment/{name}.py" for name in ("trainer", "dpo", "kto", "sft")))
SAMPLE, SEED = 100, 0
PLACE = Path("mutants")
OPEN = ("not checked", "check was interrupted by user")
SURVIVED = ("survived", "no tests", "suspicious", "segfault")


def main() -> None:
    """Try what was not tried yet, and print the table and what survives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--since", metavar="COMMIT")
    parser.add_argument("files", nargs="*", metavar="FILE")
    options = parser.parse_args()
    files = options.files or [*WHOLE, *SAMPLED]
    temporary = (PLACE / "temporary").resolve()
    shutil.rmtree(temporary, ignore_errors=True)  # what the tests of a mutant leave there
    temporary.mkdir(parents=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(temporary)
    with_decorated_functions()
    copy_src_dir()
    copy_also_copy_files()
    mutmut.create_mutants(1)
    again = SURVIVED if options.again else ()
    if again:  # which tests call which function may have changed
        (PLACE / "mutmut-stats.json").unlink(missing_ok=True)
    tried_here = {file: results(file, options.since) for file in files}
    wanted = [name for found in tried_here.values() for name, result in found.items() if result in OPEN + again]
    if wanted:
        mutmut._run(wanted, 1)
    print(table(files, options.since))
    for file in files:
        for name, found in results(file, options.since).items():
            if found in SURVIVED:
                print(f"\n{found}: {name}", *changed(name, file), sep="\n")


def results(file: str, since: str | None) -> dict[str, str]:
    """Return mutant → how it fared, of those that are tried; with a commit, of the functions that changed since."""
    names = sorted(tried(file).items(), key=order)
    if since is not None:
        before = functions(
            subprocess.run(["git", "show", f"{since}:{file}"], capture_output=True, text=True, check=True).stdout
        )
        now = functions(Path(file).read_text())
        names = [item for item in names if before.get(function := function_of(item[0])) != now[function]]
    return {name: status_by_exit_code[exit_code] for name, exit_code in names}


def functions(source: str) -> dict[str, str]:
    """Return name → code of each function and method of a module, without its comments."""
    found = {}
    for node in ast.parse(source).body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                found[f"{node.name}.{inner.name}" if inner is not node else inner.name] = ast.dump(inner)
    return found


def function_of(mutant: str) -> str:
    """Return the function of a mutant: `Ledger.decide` for `tasks.tracking.ledger.xǁLedgerǁdecide__mutmut_3`."""
    name = mutant.rpartition(".")[2].rpartition("__mutmut_")[0]
    return name.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in name else name.removeprefix("x_")


def tried(file: str) -> dict[str, int | None]:
    """Return the mutants of a file that are tried, with their exit codes; a change of one function redraws few."""
    if file in WHOLE:
        return made(file)
    every = [name for other in SAMPLED for name in made(other)]
    drawn = set(sorted(every, key=lambda name: sha256(f"{SEED} {name}".encode()).digest())[:SAMPLE])
    return {name: exit_code for name, exit_code in made(file).items() if name in drawn}


def made(file: str) -> dict[str, int | None]:
    """Return every mutant of a file, with its exit code."""
    data = SourceFileMutationData(path=file)
    data.load()
    return data.exit_code_by_key


def changed(name: str, file: str) -> list[str]:
    """Return the lines that a mutant takes away and puts in."""
    difference = get_diff_for_mutant(name, path=file).splitlines()[2:]
    return [line for line in difference if line.startswith(("-", "+"))]


def order(item: tuple[str, Any]) -> tuple[str, int]:
    """Sort by function, then by number."""
    function, _, number = item[0].rpartition("_")
    return function, int(number)


def table(files: Sequence[str], since: str | None) -> str:
    """Return the table of README.md."""
    lines = ["| file | mutants | killed | timed out | survived | not tried |", "|---|---|---|---|---|---|"]
    for file in files:
        count = Counter(results(file, since).values())
        survived, left = (sum(count[one] for one in group) for group in (SURVIVED, OPEN))
        all_of_them = f"{count.total()} of {len(made(file))}" if file in SAMPLED else f"{count.total()}"
        lines.append(f"| {file} | {all_of_them} | {count['killed']} | {count['timeout']} | {survived} | {left} |")
    return "\n".join(lines)


def with_decorated_functions() -> None:
    """Let mutmut mutate properties and context managers too, which it leaves out: `Verdict.passes` is one."""
    visitor, arrange = file_mutation.MutationVisitor, file_mutation.function_trampoline_arrangement
    skips = visitor._skip_node_and_children

    def skip(self: Any, node: cst.CSTNode) -> bool:
        decorated = isinstance(node, cst.FunctionDef) and node.decorators
        return skips(self, node.with_changes(decorators=()) if decorated else node)

    def arranged(function: cst.FunctionDef, mutants: Any, class_name: str | None) -> Any:
        declared, methods, assigned, names = arrange(function.with_changes(decorators=()), mutants, class_name)
        switch = methods[0].with_changes(decorators=[*function.decorators, *methods[0].decorators])
        return declared, [switch, *methods[1:]], assigned, names

    visitor._skip_node_and_children = skip
    file_mutation.function_trampoline_arrangement = arranged


if __name__ == "__main__":
    main()
