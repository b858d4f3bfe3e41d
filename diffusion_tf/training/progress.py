"""How far a run is, beside its weights."""

import dataclasses
import math

from diffusion_tf.errors import DamagedFileError
from diffusion_tf.storage import checkpoints
from diffusion_tf.training.trainer import zero_sums


@dataclasses.dataclass
class Progress:
    """How far a run is beside its state: what a checkpoint's manifest holds, so that a resumed run is the run.

    Attributes:
      data_order: which order of the data; the second once the run has gone back.
      sums: of the steps since the last line of metrics, as `Trainer.run_steps` has them.
    """

    data_order: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(zero_sums(), 0.0))

    @classmethod
    def of_checkpoint(cls, path: str) -> "Progress":
        """As the manifest at `path` states it; one of format 1 states nothing."""
        stated = checkpoints.load_manifest(path).get("progress")
        try:
            return (
                cls(int(stated["data_order"]), {k: float(stated["sums"][k]) for k in zero_sums()}) if stated else cls()
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} does not tell the run's progress: remove it") from error

    def take_metrics(self) -> dict[str, float]:
        """The means since the last line of metrics; the sums begin again."""
        sums, count = self.sums, self.sums["finite_steps"]
        means = {name: sums[name] / count if count else math.nan for name in ("loss", "grad_norm")}
        self.sums = {**dict.fromkeys(sums, 0.0), "skipped_in_row": sums["skipped_in_row"]}
        return {**means, "param_norm": sums["param_norm"], "skipped_steps": int(sums["skipped_steps"])}

    def has_diverged(self, max_skipped_steps: int) -> bool:
        """Whether to stop: too many steps in a row were skipped, or the weights themselves are not finite."""
        return self.sums["most_in_row"] >= max_skipped_steps or not math.isfinite(self.sums["param_norm"])
