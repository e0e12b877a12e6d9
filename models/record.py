"""The base of all records that a recipe is made of, and their settings as a flat list."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, use_attribute_docstrings=True
    )


def first(*names: str) -> ConfigDict:
    """Return the setting that shows these keys before the inherited ones, wherever a schema is drawn as a form."""

    def reorder(schema: dict[str, Any]) -> None:
        told = schema["properties"]
        schema["properties"] = {name: told[name] for name in (*names, *(name for name in told if name not in names))}

    return ConfigDict(json_schema_extra=reorder)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings as `steps.1.lambda` → value."""
    if isinstance(tree, list) and any(isinstance(item, (dict, list)) for item in tree):
        tree = {str(i): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, item in tree.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
