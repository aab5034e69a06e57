"""Text from elsewhere never controls a terminal, a page or a script: one function escapes it at every output."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from launcher.outcome import say
from seqaware.config.schema import Config
from seqaware.doctor.findings import warning
from seqaware.doctor.findings_table import show
from seqaware.errors import ConfigError, DataError
from seqaware.masking import escaped, escaped_lines
from seqaware.metrics.progress import ProgressDisplay
from seqaware.plan.slurm import SlurmJob, sbatch_script
from seqaware.report.live_view import frame
from seqaware.report.page import write_report
from seqaware.report.preview import Preview, ShownDocument, ShownRow, ShownToken, show_preview
from seqaware.report.preview_html import preview_html
from seqaware.watchdog import first_error
from seqaware.watchdog.rank_log import last_lines
from tests.unit.report.runs import write_run

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[31m\x1b]0;title\x07\x9b2J\u202eb\rc\u2028d\u200be"
NAME = HOSTILE + "<img src=x onerror=alert(1)>[bold]$\\frac$"
SAFE = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2028\u2029]*")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Straße 東京 ‏ نمی‌خواهم 👩‍💻".replace("\u200f", ""), "Straße 東京  نمی‌خواهم 👩‍💻"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b\x7f\x00", r"\x9b\x7f\x00"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202e\u2066\ufeff", r"\u202e\u2066\ufeff"),
        ("\U000e0041", r"\U000e0041"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_controls_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(shown) == shown


def test_a_line_of_a_message_can_only_be_an_indented_one() -> None:
    assert escaped("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert escaped_lines("2 problems:\n  - a\n  - b\nerror: none") == "2 problems:\n  - a\n  - b\\nerror: none"


def test_every_error_is_escaped() -> None:
    error = DataError(f"{HOSTILE}\nerror: x", got=f"{HOSTILE}\nerror: y", do=f"{HOSTILE}\nerror: z")
    assert SAFE.fullmatch(str(error)) and "\n" not in str(error)
    with pytest.raises(ConfigError):
        raise ConfigError(HOSTILE)


def test_commands_print_escaped_text(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"prepared    {HOSTILE}\nnext")
    say(HOSTILE, err=True)
    printed = capsys.readouterr()
    assert SAFE.fullmatch(printed.out) and printed.out.count("\n") == 2
    assert SAFE.fullmatch(printed.err)


def test_a_run_of_any_name_is_shown_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / NAME.replace("/", ""), done=30)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "skipped", "step": HOSTILE, "documents": [NAME]}) + "\n")
    plan = json.loads((folder / "plan.json").read_text())
    plan["config"]["dataset"] = {"name": NAME}
    (folder / "plan.json").write_text(json.dumps(plan))
    output = io.StringIO()
    Console(file=output, width=200, no_color=True).print(frame(folder, width=200))
    assert SAFE.fullmatch(output.getvalue()) and r"a\x1b[31m" in output.getvalue()
    other = write_run(tmp_path / "other", gamma=0.5)
    page = write_report([folder, other], out=tmp_path / "report").read_text()
    assert SAFE.fullmatch(page) and "<img src=x" not in page and r"a\x1b[31m" in page


def test_previews_are_escaped() -> None:
    document = ShownDocument(NAME, (ShownToken(HOSTILE, 1, 1.0), ShownToken(f"\n{NAME}", 0, 0.0)))
    preview = Preview(NAME, NAME, 8, (ShownRow(0, (document,), 1),), 0)
    output = io.StringIO()
    show_preview(preview, console=Console(file=output, width=200, no_color=True), documents=1)
    assert SAFE.fullmatch(output.getvalue()) and output.getvalue().count(r"a\x1b[31m") == 5
    page = preview_html(preview)
    assert SAFE.fullmatch(page) and "<img src=x" not in page


def test_the_doctor_and_the_progress_display_are_escaped() -> None:
    output = io.StringIO()
    show([warning(NAME, NAME, NAME)], hosts=1, console=Console(file=output, width=200, no_color=True))
    ProgressDisplay(3, style="lines", console=Console(file=output, width=200, no_color=True)).say(NAME)
    assert SAFE.fullmatch(output.getvalue()) and output.getvalue().count("[bold]") == 4


def test_rank_logs_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank.log").write_bytes(f"{HOSTILE}\n{HOSTILE}\n".encode() + b"\xff\x1bc")
    lines = last_lines(tmp_path / "rank.log", 10)
    assert all(SAFE.fullmatch(line) for line in lines)
    screen = (tmp_path / "screen").open("wb")
    monkeypatch.setattr(first_error, "_screen", screen.fileno())
    first_error.show(f"rank 1 failed: {HOSTILE}\n\tat x")
    screen.close()
    assert (tmp_path / "screen").read_text().endswith("\n\tat x\n")
    assert SAFE.fullmatch((tmp_path / "screen").read_text().replace("\t", ""))


@pytest.mark.parametrize("where", ["folder", "arguments"])
def test_a_script_for_slurm_holds_no_line_of_a_name(tmp_path: Path, where: str) -> None:
    config = Config.model_validate({"model": {"base_name": "a"}, "dataset": {"name": "b"}})
    given = {"arguments": ["my.yaml"], "folder": tmp_path}
    given |= {where: ["my.yaml", "x\n#SBATCH -w y"] if where == "arguments" else tmp_path / "x\n#SBATCH -w y"}
    with pytest.raises(ConfigError, match="cannot hold control characters"):
        sbatch_script(config, job=SlurmJob(), deepspeed_path=None, **given)  # type: ignore[arg-type]


def _outputs() -> Iterator[tuple[str, str]]:
    """The file and the name of every call that prints."""
    for folder in ("seqaware", "launcher"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if name in ("print", "typer.echo", "typer.secho", "click.echo", "sys.stdout.write", "sys.stderr.write"):
                    yield path.relative_to(ROOT).as_posix(), name


def test_no_output_bypasses_the_function() -> None:
    """Print through `launcher.outcome.say`, or say here why the text cannot be hostile."""
    assert set(_outputs()) == {
        ("launcher/outcome.py", "typer.echo"),  # say
        ("launcher/cli.py", "typer.echo"),  # the version
        ("launcher/sbatch.py", "typer.echo"),  # a script without control characters, as tested above
        ("seqaware/config/reference.py", "sys.stdout.write"),  # made of our own docstrings
        ("seqaware/compat/build_lock.py", "print"),  # of an escaped text
        ("seqaware/distributed/rendezvous.py", "print"),  # as well
        ("seqaware/training/process.py", "print"),  # as well
        ("seqaware/doctor/host_probe.py", "print"),  # JSON in ASCII, for another process
        ("seqaware/doctor/findings_table.py", "print"),  # of texts that were escaped
    }
