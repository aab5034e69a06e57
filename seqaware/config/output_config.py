"""What a run leaves, what it does when something goes wrong, and what it tells: output, faults and logging."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from seqaware.config.profile_config import ProfileConfig
from seqaware.config.values import Count, CountOrZero, Flag, FromOne, LocalName, Minutes, Section, Text


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class OutputConfig(Section):
    """What a run leaves, and where."""

    dir: LocalName | None = None
    """Folder of the run; null: runs/<model.output_name>."""
    save_every: Count | None = None
    """Optimizer steps between checkpoints; null, and save_every_minutes too: only at the end."""
    save_every_minutes: Minutes | None = None
    """Minutes between checkpoints, by the clock of rank 0; may be written beside save_every."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Checkpoints of steps that are a multiple of this are kept for good."""
    keep_best: CountOrZero = 0
    """Keep the checkpoints of this many lowest held-out losses too. An evaluated step that becomes one of them is saved
    at once, whatever save_every. Needs evaluation.every_steps or every_minutes."""
    async_save: Flag = False
    """Write checkpoints while training goes on; needs CPU memory for one more copy of what a rank saves."""
    save_model: Flag = True
    """Write the trained model as a Hugging Face folder at the end."""


class FaultsConfig(Section):
    """What the run does when something goes wrong, and when it leaves in good time."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: stop and name its documents, or pass over it, counted."""
    max_skipped_steps: Count = 10
    """More steps passed over than this, for whichever reason, stop the run."""
    spike_factor: FromOne | None = None
    """A loss above this times the median of the last spike_window steps: go back to a checkpoint and pass over the
    step. null: never."""
    spike_window: Count = 50
    """Steps whose median a loss is held against; before so many have been seen there are no spikes."""
    hang_minutes: Minutes | None = 30.0
    """A rank that makes no progress for so long ends the run, by name; null: wait for ever."""
    connect_minutes: Minutes = 5.0
    """While they start, ranks wait so long for each other; then the run ends and names the address, the ranks that are
    missing and the cause."""
    time_limit_minutes: Minutes | None = None
    """Save and leave before the run has lasted so long. A SLURM job's own limit is found out without this."""
    leave_minutes: Minutes = 5.0
    """How long before a time limit the run saves and leaves; at most a quarter of the limit."""


class LoggingConfig(Section):
    """What a run tells while it goes on. metrics.jsonl is always written."""

    progress: Annotated[Literal["auto", "bar", "lines", "off"], BeforeValidator(_off)] = "auto"
    """auto: a bar on a terminal, lines in a file."""
    profile: ProfileConfig | None = None
    """Steps that torch's profiler records; null: none."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Services that get the figures too; tokens and addresses come from the environment."""
    project: Text = "seqaware"
    """Project of W&B, experiment of MLflow."""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline: a folder in the run's, for `wandb sync`; null: WANDB_MODE, else online."""
    mlflow_uri: Text | None = None
    """Address of MLflow; null: MLFLOW_TRACKING_URI, else the folder mlruns beside the run's."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers names one twice; got {list(self.trackers)}")
        return self
