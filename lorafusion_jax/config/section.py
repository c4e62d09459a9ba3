"""What all sections of the configuration are: validated records that cannot be changed."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: strict, immutable, no unknown keys, no infinities."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
