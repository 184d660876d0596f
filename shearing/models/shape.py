"""The shape of a decoder model, as numbers; importable without torch."""

from pydantic import Field

from shearing.config import Config


class Shape(Config):
    """A complete model shape. `head_size` never changes under pruning."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)


class TargetShape(Config):
    """The shape asked for; a dimension left out keeps the source's size."""

    num_layers: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)

    def within(self, source: Shape) -> Shape:
        """The full shape that this target means for a given source. Raises nothing: preflight checks sizes."""
        return source.model_copy(update=self.model_dump(exclude_none=True))
