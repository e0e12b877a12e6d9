"""report.json is what its records say, and so is the schema beside them."""

import json
from pathlib import Path

from models.gate.gate import Check
from models.report import tree

SCHEMA = Path(tree.__file__).with_name("report.schema.json")


def test_the_schema_is_made_from_the_records() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == tree.schema(), "python -m models.report.tree > report.schema.json"


def test_a_check_that_nobody_could_make_holds_no_nan() -> None:
    """JSON has none: a reader in another language would refuse the whole report."""
    entry = tree.check_entry(Check("helpful against the base", float("nan"), float("nan"), 0.45, False, "lower bound"))
    assert (entry["value"], entry["bound"], entry["holds"]) == (None, None, False)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
