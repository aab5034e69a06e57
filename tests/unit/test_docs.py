"""What the documents tell people to type: commands exist and take those options, and those marked runnable run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launcher.cli import COMMANDS, app
from seqaware.config.reference import config_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(?:^|[\s(])(?:seqaware (?P<name>[a-z0-9-]+)|launcher/(?P<file>\w+)\.py)(?P<rest>[^#|;&`]*)")


@dataclass(frozen=True)
class Command:
    """One of ours, as a page has it: on line `line` of the page."""

    page: str
    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.name} {' '.join(self.arguments)}"


def blocks(page: Path, info: str | None = None) -> Iterator[list[str]]:
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if info is None or found["info"].strip() == info:
            body = found["body"].replace("\\\n", " ")
            yield [line.strip() for line in body.splitlines() if line.strip()]


def commands(page: Path, lines: list[str]) -> Iterator[Command]:
    for line in lines:
        for found in OURS.finditer(line):
            name = found["name"] or str(found["file"]).replace("_", "-")
            yield Command(page.name, name, tuple(shlex.split(found["rest"], comments=True)))


def test_the_pages_tell_people_what_to_type() -> None:
    runnable = [line for page in PAGES for block in blocks(page, "sh run") for line in block]
    assert len(PAGES) > 10 and len(runnable) > 8


def test_every_command_in_a_block_exists_and_takes_its_options() -> None:
    wrong = []
    for page in PAGES:
        for command in (each for block in blocks(page) for each in commands(page, block)):
            if command.name not in COMMANDS:
                wrong.append(f"{command}: no such command")
                continue
            module = __import__(COMMANDS[command.name].module, fromlist=["app"])
            known = {option for each in typer.main.get_command(module.app).params for option in each.opts}
            options = {each.partition("=")[0] for each in command.arguments if each.startswith("--")}
            wrong += [f"{command}: no option {option}" for option in options - known - {"--help"}]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_file_that_a_page_names_is_there() -> None:
    named = re.compile(
        r"(?<![\w/.])(?:train_configs|ds_configs|slurm|docs|launcher|seqaware|tests|benchmarks|examples)/[\w./-]*\w"
    )
    missing = []
    for page in PAGES:
        for path in set(named.findall(page.read_text(encoding="utf-8"))):
            is_pattern = Path(path).stem.isupper()  # launcher/NAME.py
            if not (
                is_pattern or (ROOT / path).exists() or (ROOT / f"{path}.py").exists() or list(ROOT.glob(f"{path}*"))
            ):
                missing.append(f"{page.name}: {path}")
    assert not missing, "\n" + "\n".join(missing)


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "sh run"))], ids=lambda page: page.name)
def test_runnable_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train_configs", "ds_configs", "demo", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for line in (line for block in blocks(page, "sh run") for line in block):
        found = list(commands(page, [line]))
        assert len(found) == 1, f"{page.name}: a runnable line is one command of ours: {line}"
        result = CliRunner().invoke(app, [found[0].name, *found[0].arguments])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert result.output.strip()


def test_the_config_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == config_reference(), "python -m seqaware.config.reference > docs/config.md"
