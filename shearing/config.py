"""The base of every configuration class: strict, immutable, and free of torch and Ray."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A configuration section. Unknown keys are refused; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
