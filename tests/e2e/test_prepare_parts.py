"""The command that prepares data in parts, as an array of jobs types it, and the run that finds the store."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.prepare import app
from seqaware.config.loading import load_config
from seqaware.data.store.store_index import find_store
from tests import launch, tiny


def _prepare(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("parts"), answers=range(1, 140))


def test_parts_by_several_processes_at_once(workshop: tiny.Workshop, tmp_path: Path) -> None:
    """Three parts at the same time, one of them twice; then the merge; then everything by one command, elsewhere."""
    held_out = {"name": str(workshop.rows), "max_examples": 5, "store_dir": str(workshop.folder / "stores")}
    path = str(workshop.write("parts", workshop.config(evaluation__dataset=held_out)))
    command = ["launcher/prepare.py", path, "--part"]
    started = [
        launch.Forked([*command, f"{index}/3"], ranks=None, folder=tmp_path / str(number))
        for number, index in enumerate((1, 2, 3, 2))
    ]
    for process, index in zip(started, (1, 2, 3, 2), strict=True):
        assert process.finish() == 0 and f"part {index}/3 " in process.said()[0], process.said()
    config = load_config(Path(path))
    assert find_store(config) is None
    code, output = _prepare(path, "--merge", "3")
    assert code == 0 and output.count("prepared ") == 2, output
    stores = workshop.folder / "stores"
    assert not list(stores.glob("*.parts"))
    made = _files(stores)
    assert find_store(config) is not None and find_store(config, config.evaluation.dataset) is not None
    shutil.rmtree(stores)
    assert _prepare(path)[0] == 0
    assert _files(stores) == made


def test_what_is_missing_is_told_with_the_command_that_makes_it(workshop: tiny.Workshop) -> None:
    path = str(workshop.write("missing", workshop.config(dataset__max_examples=50)))
    override = 'format.answer_template="{answer} {question}"'
    assert _prepare(path, "--set", override, "--part", "1/2")[0] == 0
    code, output = _prepare(path, "--set", override, "--merge", "2")
    assert code == 2 and output.startswith("error: ") and "part 2/2 is missing" in output
    advised = output.split("run: ")[1].strip()
    assert shlex.split(advised) == ["python", "launcher/prepare.py", path, f"--set={override}", "--part", "2/2"]
    assert _prepare(path, f"--set={override}", "--part", "2/2")[0] == 0
    assert _prepare(path, "--set", override, "--merge", "2")[0] == 0
    # Both again: the store is there.
    for step in (["--part", "1/2"], ["--merge", "2"]):
        code, output = _prepare(path, "--set", override, *step)
        assert code == 0 and "stores/" in output and ".parts" not in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "3/2"], "I/N"),
        (["--part", "1/2", "--merge", "2"], "two steps"),
        (["--merge", "0"], "greater than"),
        (["--part", "1/2", "--set", "dataset.name=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_one_error(workshop: tiny.Workshop, arguments: list[str], said: str) -> None:
    path = str(workshop.write("wrong", workshop.config()))
    code, output = _prepare(path, *arguments)
    assert code == 2 and said in output, output


def test_a_prepared_store_has_no_parts(workshop: tiny.Workshop) -> None:
    path = str(workshop.write("whole", workshop.config()))
    store = _prepare(path)[1].split()[-1]
    named = str(workshop.write("named", workshop.config(dataset={"name": store})))
    for step in (["--part", "1/2"], ["--merge", "2"]):
        code, output = _prepare(named, *step)
        assert code == 2 and "prepared store" in output
