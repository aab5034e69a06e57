"""torch's profiler over a few steps, as a trace that chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from seqaware.config.profile import ProfileConfig
from seqaware.training.process import Say


class ProfileWindow:
    """Records the steps that `logging.profile` names, on the rank that has one.

    Args:
        last: of the run. folder: where the trace is written, `steps-10-12.json`. Recorded steps are slower.
    """

    def __init__(self, config: ProfileConfig, folder: Path, *, last: int, device: torch.device, say: Say) -> None:
        self._first, self._last = config.first, min(last, config.first + config.steps - 1)
        self._folder = folder
        self._say = say
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._recording: profile | None = None
        self._begun = 0

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around a step of the loop; a run that fails inside the window leaves a trace of the steps it made."""
        if self._first <= step <= self._last and self._recording is None:
            self._recording = profile(activities=self._activities, record_shapes=True)
            self._recording.start()
            self._begun = step
        over = True
        try:
            with torch.profiler.record_function(f"step {step}"):
                yield
            over = step >= self._last
        finally:
            if over:
                self._close(step)

    def _close(self, step: int) -> None:
        """Write what was recorded, up to `step`, if anything was."""
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        recording.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._begun}-{step}.json"
        recording.export_chrome_trace(str(path))
        self._say(f"profile     of the steps {self._begun} to {step}: open {path} at ui.perfetto.dev")
