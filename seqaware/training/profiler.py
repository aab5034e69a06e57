"""torch's profiler over a few steps, as a trace that chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from seqaware.config.profile_config import ProfileConfig
from seqaware.training.process import Say


class ProfileWindow:
    """Records the steps that `logging.profile` names. Every rank has one, and knows where it begins and ends.

    Args:
        config: None records nothing. folder: where the trace is written, `steps-10-12.json`; None on the ranks that
            leave none. last: step of the run. Recorded steps are slower.
    """

    def __init__(
        self, config: ProfileConfig | None, folder: Path | None, *, last: int, device: torch.device, say: Say
    ) -> None:
        self._steps = range(config.first, min(last, config.first + config.steps - 1) + 1) if config else range(0)
        self._folder = folder
        self._say = say
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._recording: profile | None = None
        self._begun: int | None = None
        self._reached = 0

    def begins(self, step: int) -> bool:
        """Whether `start` is due before this step: the first of the window, or of what a resumed run has left of it."""
        return step in self._steps and self._begun is None

    def ends(self, step: int) -> bool:
        """Whether `close` is due after this step."""
        return self._begun is not None and step >= self._steps[-1]

    def start(self, step: int) -> None:
        """Record from this step on."""
        self._begun = self._reached = step
        if self._folder is not None:
            self._recording = profile(activities=self._activities, record_shapes=True)
            self._recording.start()

    @contextmanager
    def named(self, step: int) -> Iterator[None]:
        """Around a step, which the trace shows by its number."""
        if self._recording is None:
            yield
            return
        self._reached = step
        with torch.profiler.record_function(f"step {step}"):
            yield

    def _over(self) -> tuple[profile | None, int | None]:
        """The window is over: what was recorded, and since which step."""
        ended = self._recording, self._begun
        self._recording = self._begun = None
        return ended

    def drop(self) -> None:
        """Forget what was recorded: torch must not be recording when the process ends."""
        recording, _ = self._over()
        if recording is not None:
            with suppress(RuntimeError):
                recording.stop()

    def close(self) -> None:
        """Write what was recorded, if anything was. A trace that cannot be written costs a warning and no run."""
        recording, begun = self._over()
        if recording is None or self._folder is None:
            return
        steps = f"of the steps {begun} to {self._reached}"
        path = self._folder / f"steps-{begun}-{self._reached}.json"
        try:
            recording.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a run that went back
            recording.export_chrome_trace(str(path))
            path.stat()  # a full disk is told on stderr alone
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                path.with_name(f"{path.name}.tmp").unlink()
            self._say(f"warning     the profile {steps} could not be written; got {error}")
        else:
            self._say(f"profile     {steps}: open {path} at ui.perfetto.dev")
