"""The base of all records that a recipe is made of."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, use_attribute_docstrings=True
    )
