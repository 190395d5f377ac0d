"""The base of every section of a params file, and the kinds of numbers that sections hold."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def make_way(cls, values: dict[str, Any], key: str) -> None:
        """Take from the plain `values` of a section what an override of `key` stands for."""
