"""What a slicing run has finished, in a folder: a run that was killed goes on after its last finished layer."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from shearing.errors import UserError
from shearing.models.loading import write_json

STATE_FILE, LAYERS_FOLDER = "slicing.json", "layers"


class SlicingWork:
    """Tensors and figures of the steps that are finished: step 0 is the first signal, step n + 1 is layer n.

    Args:
        folder: Made where it is not there.
        settings: All that the result depends on, as JSON holds it.

    Raises:
        UserError: The folder holds a run with other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        (self._folder / LAYERS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._settings = dict(settings)
        self.finished: list[dict[str, float]] = []
        state = self._folder / STATE_FILE
        if state.is_file():
            found = json.loads(state.read_text())
            if found["settings"] != self._settings:
                differs = sorted(key for key, value in self._settings.items() if found["settings"].get(key) != value)
                raise UserError(
                    f"{self._folder} holds a slicing run that was started with another {', '.join(differs)}. Go on "
                    "with what it was started with, or name another folder, or delete this one."
                )
            self.finished = found["finished"]

    def save(self, tensors: Mapping[str, Tensor], figures: Mapping[str, float]) -> None:
        """Keep what the next step has made; after this call it is finished."""
        path = self._path(len(self.finished))
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)
        self.finished.append(dict(figures))
        partial = self._folder / f"{STATE_FILE}.partial"
        write_json(partial, {"settings": self._settings, "finished": self.finished})
        os.replace(partial, self._folder / STATE_FILE)

    def load(self, step: int) -> dict[str, Tensor]:
        """What a finished step has made."""
        return load_file(self._path(step))

    def forget(self, step: int) -> None:
        """Delete what a step has made, once a later one holds all that matters of it."""
        self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        name = f"{step - 1:05d}" if step else "first"
        return self._folder / LAYERS_FOLDER / f"{name}.safetensors"
