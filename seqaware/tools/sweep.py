"""A sweep: one config trained with every γ and every seed, one run after the other, each in a folder of its own.

Given again, the same sweep goes on where it stood: finished runs are left alone, cut ones resume from their checkpoint.
Imports without torch; the runs are commands of their own.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from seqaware.config.loading import REPOSITORY, load_config, read_yaml
from seqaware.errors import USER_ERROR, ConfigError
from seqaware.files import MalformedError, read_json
from seqaware.metrics.progress import duration
from seqaware.training.preemption import LEFT

Say = Callable[[str], None]

_MOST_RUNS = 1000  # of the values of γ, and of the seeds

# What may differ between a run that is done and the same run given again.
_NOT_THE_RUN = ("deepspeed", "logging", "faults", "output")


@dataclass(frozen=True)
class Sweep:
    """What is trained.

    Attributes:
        config, deepspeed: as for launcher/train.py. overrides: `key=value`, for every run.
        gammas: as they were typed, which names the folders. folder: of the runs' folders.
        launch: the command before launcher/train.py, such as `deepspeed --num_gpus 8`.
    """

    config: Path
    gammas: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: Path
    overrides: tuple[str, ...] = ()
    deepspeed: Path | None = None
    launch: str = "python"

    def combinations(self) -> list[Combination]:
        """All runs, in the order of slurm/sweep.sbatch."""
        return [Combination(gamma, seed, self.folder) for gamma in self.gammas for seed in self.seeds]

    def arguments(self, combination: Combination | None) -> list[str]:
        """Those of launcher/train.py; None: what all runs have in common."""
        overrides = [*self.overrides, *(combination.overrides() if combination else [])]
        deepspeed = [] if self.deepspeed is None else ["--deepspeed", str(self.deepspeed)]
        return [str(self.config), *deepspeed, *(part for each in overrides for part in ("--set", each))]


@dataclass(frozen=True)
class Combination:
    """One γ and one seed."""

    gamma: str
    seed: int
    parent: Path

    @property
    def name(self) -> str:
        return f"gamma-{self.gamma}-seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.parent / self.name

    def overrides(self) -> list[str]:
        return [
            f"training.sft.gamma={self.gamma}",
            f"training.control.seed={self.seed}",
            f"output.dir={self.folder}",
        ]


def gammas_of(text: str) -> tuple[str, ...]:
    """`0,0.9,1` → its parts, each checked.

    Raises:
        ConfigError: a part is no number in [0, 1], or comes twice.
    """
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if len(parts) > _MOST_RUNS:
        raise ConfigError(f"--gamma names more than {_MOST_RUNS:,} numbers")
    numbers = [_number(part) for part in parts]
    if not parts or any(number is None or not 0.0 <= number <= 1.0 for number in numbers):
        raise ConfigError("--gamma needs numbers in [0, 1]", got=repr(text), do="as in --gamma 0,0.9,0.98,1")
    if len(set(numbers)) < len(numbers):
        raise ConfigError("--gamma names a number twice", got=repr(text))
    return parts


def seeds_of(text: str) -> tuple[int, ...]:
    """`3` → 1, 2, 3; `7,11` → 7, 11; `7,` → 7.

    Raises:
        ConfigError: not a count from 1, nor distinct whole numbers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError("--seeds needs a count, or seeds with commas", got=repr(text), do="as in --seeds 3")
    seeds = tuple(map(int, parts)) if "," in text else range(1, int(parts[0]) + 1)
    if len(seeds) > _MOST_RUNS:
        raise ConfigError(f"--seeds names more than {_MOST_RUNS:,} seeds", got=repr(text))
    if not seeds:
        raise ConfigError("--seeds needs at least one seed", got=repr(text))
    return tuple(seeds)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def is_done(sweep: Sweep, combination: Combination) -> bool:
    """Whether this run is complete, and of this config: one of another config is for launcher/train.py to refuse."""
    try:
        manifest = read_json(combination.folder / "manifest.json")
        found = read_yaml(combination.folder / "config.yaml")
    except (OSError, MalformedError, ConfigError):
        return False
    wanted = load_config(sweep.config, [*sweep.overrides, *combination.overrides()]).model_dump(mode="json")
    same = all(found.get(key) == value for key, value in wanted.items() if key not in _NOT_THE_RUN)
    return same and isinstance(manifest, dict) and manifest.get("finished_steps") is not None


def run_sweep(sweep: Sweep, *, say: Say) -> int:
    """Train what is not trained yet. Returns 0; 2 where a run needs a person; 85 where it left; 1 if others failed.

    Raises:
        ConfigError: the config is none, with any of the γ and seeds.
    """
    combinations = sweep.combinations()
    for combination in combinations:  # a mistake in the config is told before anything starts
        load_config(sweep.config, [*sweep.overrides, *combination.overrides()])
    (sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
    failed = []
    for number, combination in enumerate(combinations, start=1):
        head = f"{number}/{len(combinations)}  γ {combination.gamma:<6} seed {combination.seed:<3}"
        if is_done(sweep, combination):
            say(f"{head} is done")
            continue
        log = sweep.folder / "logs" / f"{combination.name}.log"
        say(f"{head} starts; {log}")
        started = time.monotonic()
        code = _train(sweep, combination, log)
        if code in (USER_ERROR, LEFT):
            say(f"{head} {'left, and goes on with the same command' if code == LEFT else _last_words(log)}")
            return code
        if code:
            failed.append(combination.name)
        outcome = f"failed with {code}: {_last_words(log)}" if code else "is done"
        say(f"{head} {outcome} after {duration(time.monotonic() - started)}")
    if failed:
        say(f"failed: {', '.join(failed)}; the same command tries them again")
    return 1 if failed else 0


def _train(sweep: Sweep, combination: Combination, log: Path) -> int:
    launch = shlex.split(sweep.launch)
    if launch == ["python"]:
        launch = [sys.executable]
    command = [*launch, str(REPOSITORY / "launcher" / "train.py"), *sweep.arguments(combination)]
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ConfigError("--launch is no command", got=sweep.launch, do=str(error)) from error
    with _signals_to(process) as asked:
        code = process.wait()
    return LEFT if asked and code <= 0 else code


@contextmanager
def _signals_to(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass on what asks a run to leave, and note it: nothing more is started then."""
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)
        process.send_signal(number)

    former = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _last_words(log: Path) -> str:
    """What went wrong, as the run's log tells it: its last line that names an error, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["nothing was said"])[-1]


def submit(sweep: Sweep, environment: Mapping[str, str], *, say: Say) -> None:
    """Queue the sweep as an array of SLURM (slurm/sweep.sbatch), and behind it the report.

    Raises:
        ConfigError: the config is none, there is no SLURM here, or it refuses.
    """
    load_config(sweep.config, sweep.overrides)
    last = len(sweep.combinations()) - 1
    script = REPOSITORY / "slurm" / "sweep.sbatch"
    variables = {
        "GAMMAS": " ".join(sweep.gammas),
        "SEEDS": " ".join(map(str, sweep.seeds)),
        "SWEEP_DIR": str(sweep.folder),
        "SEQAWARE_HOME": str(REPOSITORY),
    }
    job = _sbatch([f"--array=0-{last}", str(script), *sweep.arguments(None)], {**environment, **variables})
    say(f"submitted   job {job}: {last + 1} runs into {sweep.folder}")
    folder = shlex.quote(str(sweep.folder))
    report = shlex.join([sys.executable, str(REPOSITORY / "launcher" / "report.py")])
    options = [f"--dependency=afterany:{job}", "--job-name=seqaware-report", f"--output={sweep.folder}/report.log"]
    sweep.folder.mkdir(parents=True, exist_ok=True)
    behind = _sbatch([*options, "--wrap", f"{report} {folder}/gamma-* --out {folder}/report"], environment)
    say(f"submitted   job {behind}: the report, when they have ended, into {sweep.folder}/report")


def _sbatch(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The number of the job that was submitted."""
    command = ["sbatch", "--parsable", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError("sbatch cannot be started", got=error.strerror, do="submit where SLURM is") from error
    if done.returncode:
        raise ConfigError("sbatch refused the sweep", got=done.stderr.strip())
    return done.stdout.strip().partition(";")[0]


def folders(sweep: Sweep) -> Sequence[Path]:
    """Of the runs that have left anything to report."""
    return [each.folder for each in sweep.combinations() if (each.folder / "metrics.jsonl").is_file()]
