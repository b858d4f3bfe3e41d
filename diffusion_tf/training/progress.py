"""The progress of a run that its weights do not show."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.presets import Preset
from diffusion_tf.storage import checkpoints
from diffusion_tf.storage.workdir import Workdir

# The sums over the steps since the last line of metrics. `loss` and `grad_norm` are sums over the `finite_steps`.
# `skipped_steps` counts the others; `skipped_in_row` counts those since the last finite step, and `most_in_row` is its
# largest value. `param_norm` is the weights' global norm after the last step.
SUMS = ("loss", "grad_norm", "finite_steps", "skipped_steps", "skipped_in_row", "most_in_row", "param_norm")


@dataclasses.dataclass
class Progress:
    """What a checkpoint's manifest holds beside the training state, so that a resumed run continues bit for bit.

    Attributes:
      data_order: which shuffle of the data is in use: 0, or 1 after a rollback.
      sums: those of SUMS, as `Trainer.run_steps` returns them.
    """

    data_order: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))

    @classmethod
    def of_checkpoint(cls, path: str) -> "Progress":
        """Reads the progress from the manifest of the checkpoint at `path`; a checkpoint of format 1 has none.

        Raises:
          DamagedFileError: the manifest holds no valid progress.
        """
        stored = checkpoints.load_manifest(path).get("progress")
        if not stored:
            return cls()
        try:
            return cls(int(stored["data_order"]), {name: float(stored["sums"][name]) for name in SUMS})
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} does not tell the run's progress: remove it") from error

    def to_array(self) -> np.ndarray:
        """The progress as float32 [1 + len(SUMS)], without loss: the sums are float32."""
        return np.array([self.data_order, *(self.sums[name] for name in SUMS)], np.float32)

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Progress":
        """The progress of which `to_array` returned `array`."""
        data_order, *sums = array.tolist()
        return cls(int(data_order), dict(zip(SUMS, sums, strict=True)))

    def add(self, losses: np.ndarray, grad_norms: np.ndarray, param_norm: float) -> None:
        """Adds steps to the sums, in float32 and one by one as `Trainer.run_steps` does.

        Args:
          losses: the loss of each step, float32 [N].
          grad_norms: the gradient norm of each step, float32 [N].
          param_norm: the weights' global norm after the last step.
        """
        sums = {name: np.float32(value) for name, value in self.sums.items()}
        for loss, grad_norm in zip(losses, grad_norms, strict=True):
            if np.isfinite(loss) and np.isfinite(grad_norm):
                sums["loss"] += loss
                sums["grad_norm"] += grad_norm
                sums["finite_steps"] += 1
                sums["skipped_in_row"] = np.float32(0)
            else:
                sums["skipped_steps"] += 1
                sums["skipped_in_row"] += 1
                sums["most_in_row"] = max(sums["most_in_row"], sums["skipped_in_row"])
        self.sums = {name: float(value) for name, value in sums.items()} | {"param_norm": float(param_norm)}

    def take_metrics(self) -> dict[str, float]:
        """Returns the means over the steps since the last line of metrics, and resets the sums."""
        sums, count = self.sums, self.sums["finite_steps"]
        means = {name: sums[name] / count if count else math.nan for name in ("loss", "grad_norm")}
        self.sums = {**dict.fromkeys(sums, 0.0), "skipped_in_row": sums["skipped_in_row"]}
        return {**means, "param_norm": sums["param_norm"], "skipped_steps": int(sums["skipped_steps"])}

    def has_diverged(self, max_skipped_steps: int) -> bool:
        """Whether `max_skipped_steps` steps in a row were skipped, or a weight is not finite."""
        return self.sums["most_in_row"] >= max_skipped_steps or not math.isfinite(self.sums["param_norm"])


def restore_run(
    workdir: Workdir, preset: Preset, restore: Callable[[str], None], versions: Mapping[str, str]
) -> Progress | None:
    """Restores the newest sound checkpoint, and returns its progress; None if there is no checkpoint.

    Args:
      workdir: the run's folder.
      preset: its configuration.
      restore: restores the state of training from the checkpoint at a path.
      versions: of the packages that go on, as `checkpoints.packages` returns them.

    Raises:
      InputError: all checkpoints are damaged, or `restore` raises it.
    """
    path = checkpoints.restore_newest(workdir.checkpoints, restore)
    if path is None:
        return None
    manifest = checkpoints.load_manifest(path)
    if manifest.get("packages", versions) != versions:
        logging.warning("%s was written by %s: the run goes on, not bit for bit", path, manifest["packages"])
    recipes = [preset.recipe_sha256() for preset in (preset, *workdir.earlier_recipes())]
    if manifest.get("config_sha256", recipes[0]) not in recipes:
        logging.warning("%s has another recipe than config.json, or comes from another version", path)
    return Progress.of_checkpoint(path)
