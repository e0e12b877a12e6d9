"""Peak memory and time of preparing one million comparisons: read, checked, deduplicated, split, kept apart.

The rows are in the format of PKU-SafeRLHF, with prompts of 8 to 16 words and answers of 20, drawn from a vocabulary of
5,000 made-up words; one in a hundred repeats the row before it. The work runs in a process of its own.

    python benchmarks/million_rows.py [ROWS]
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Write the file, prepare it in another process, and print what that took."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "pairs.jsonl", rows)
        subprocess.run([sys.executable, __file__, "--prepare", folder], check=True)


def write(path: Path, rows: int) -> None:
    """Write `rows` comparisons."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = list(dict.fromkeys("".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(9000)))[:5000]
    with path.open("w") as file:
        line = ""
        for number in range(rows):
            if number % 100 or not line:
                prompt, one, two = (" ".join(draw.choices(words, k=k)) for k in (draw.randint(8, 16), 20, 20))
                safer, better = draw.randint(0, 1), draw.randint(0, 1)
                record = {"prompt": prompt, "response_0": one, "response_1": two}
                record |= {"safer_response_id": safer, "better_response_id": better}
                line = json.dumps(record) + "\n"
            file.write(line)


def prepare(folder: Path) -> None:
    """Prepare the file, and print seconds, peak memory and counts."""
    from models.artifacts import Sources
    from models.data import preferences
    from models.recipe import Data, Selection

    out = folder / "out"
    out.mkdir()
    sources = Sources(path=folder, digest="", files={"steps.0": str(folder / "pairs.jsonl")})
    before, started = _peak(), time.perf_counter()
    found = preferences.prepare(out, sources, "steps.0", Selection(metric="harmless", paired=True), Data())
    spent = time.perf_counter() - started
    size = (folder / "pairs.jsonl").stat().st_size / 2**20
    print(
        f"{size:.0f} MiB of rows: {spent:.0f} s, at most {_peak():.0f} MiB resident ({before:.0f} before the first row)"
    )
    print(found.counts)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]))
    else:
        main()
