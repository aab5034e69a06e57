"""`launcher/push.py` against a hub on loopback: what arrives, and what never leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from seqaware.config.schema import Config
from seqaware.errors import ConfigError
from seqaware.tools.push import pack
from tests import launch, patience, tiny
from tests.hub import Hub, hub

TOKEN = "hf_" + "Sq9tQ" * 6
CERTIFICATE = {
    "verdict": "holds",
    "items": [{"verdict": "holds"}] * 12,
    "oracle": "float64 on the CPU",
    "steps": [1, 2],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as training leaves it, with a model, a verification and an evaluation."""
    workshop = tiny.build(tmp_path_factory.mktemp("push"), answers=(2, 3))
    folder = workshop.folder / "run"
    folder.mkdir()
    workshop.model.rename(folder / "model")
    config = Config.model_validate(workshop.config()).model_dump(mode="json")
    topology = {"ranks": 4, "nodes": 2, "launcher": "torchrun", "zero_stage": 3, "dtype": "float32"}
    manifest: dict[str, Any] = {
        "seqaware": "0.1.0",
        "git_revision": None,
        "data_fingerprint": "abc123",
        "mathematics": {"objective": {}, "data": {}},
        "attempts": [{"topology": topology}],
        "finished_steps": 7,
    }
    shares = {"exact_match": 0.25, "exact_match_low": 0.2, "exact_match_high": 0.3, "questions": 300}
    dataset = {"name": "gsm8k", "split": "test"}
    losses = [{"kind": "evaluation", "step": step, "unweighted_loss": loss} for step, loss in ((0, 2.0), (7, 1.5))]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    results = folder / "evaluations" / "model" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({**shares, "evaluation": {"dataset": dataset}}))
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000007" / "optimizer.pt").write_bytes(b"not for others")
    return folder


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub({}) as running:
        running.uploads.right_token = TOKEN
        yield running


def push(server: Hub, cache: Path, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    env = {**server.environment(cache), "PYTHONPATH": str(launch.ROOT), **({"HF_TOKEN": token} if token else {})}
    command = [sys.executable, "launcher/push.py", *arguments]
    done = patience.run(command, cwd=launch.ROOT, env=env)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_run_arrives_in_one_commit_and_in_private(server: Hub, run: Path, tmp_path: Path) -> None:
    done = push(server, tmp_path, str(run), "someone/tiny")
    assert done.returncode == 0, done.stderr
    (repository,) = server.server.repositories
    assert repository.private and len(server.uploads.commits) == 1
    sent = {path: (repository.folder / path).read_bytes() for path in repository.paths()}
    assert sent["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert sent["training/evaluations/model/results.json"] and sent["training/certificate.json"]
    assert not any("checkpoints" in path or path.startswith(".") for path in sent)
    assert not any(TOKEN.encode() in content for content in sent.values())
    assert not any(TOKEN in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    card = sent["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # it was a folder's path
    for told in ("w_k = (1 − γ^k) / (1 − γ)", "| gamma | 0.98 |", "abc123", "4 ranks on 2 nodes, ZeRO-3"):
        assert told in card
    for told in ("2.0000 → 1.5000", "exact match: 25.0% (95 %: 20.0% to 30.0%) of 300 rows", "12 of 12 comparisons"):
        assert told in card
    assert str(run.parent) not in card
    # transformers reads it from there, with the token.
    loads = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", loads, "someone/tiny"]
    read = patience.run(command, cwd=tmp_path, env={**server.environment(tmp_path), "HF_TOKEN": TOKEN})
    assert read.returncode == 0, read.stderr


def test_a_dry_run_and_a_missing_token_send_nothing(server: Hub, run: Path, tmp_path: Path) -> None:
    done = push(server, tmp_path, str(run), "someone/tiny", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout and "nothing was sent" in done.stdout and "# tiny" in done.stdout
    done = push(server, tmp_path, str(tmp_path / "nowhere"), "someone/tiny", token=None)
    assert done.returncode == 2 and done.stderr.startswith("error: no token for the hub: HF_TOKEN is not set")
    torn = run / "checkpoints" / "step-00000007"
    done = push(server, tmp_path, str(torn), "someone/tiny", "--dry-run", token=None)
    assert done.returncode == 2 and "not a complete checkpoint; got " in done.stderr, done.stderr
    assert server.requests == []


def test_what_the_hub_or_we_refuse_is_told_in_a_line(server: Hub, run: Path, tmp_path: Path) -> None:
    wrong = push(server, tmp_path, str(run), "someone/tiny", token="hf_" + "x" * 30)
    assert wrong.returncode == 2 and "error: the hub did not take someone/tiny" in wrong.stderr
    assert "hf_xxx" not in wrong.stderr
    public = tmp_path / "public"
    public.mkdir()
    server.server.add("someone/open", public, private=False)
    done = push(server, tmp_path, str(run), "someone/open")
    assert done.returncode == 2 and "is there already, and public" in done.stderr
    leaking = run / "model" / "notes.txt"
    leaking.write_text(f"the token is {TOKEN}")
    done = push(server, tmp_path, str(run), "someone/tiny")
    leaking.unlink()
    assert done.returncode == 2 and "holds a password or a token; got notes.txt" in done.stderr
    assert not server.uploads.commits


def test_files_of_any_size_are_read_in_pieces(tmp_path: Path) -> None:
    model = tiny.build(tmp_path, answers=(2, 3)).model
    for length in (2**20 - 10, 3 * 2**20 - 2):  # the token lies over the end of a piece
        (model / "special_tokens_map.json").write_text(json.dumps("x" * length + " hf_" + "a" * 30))
        with pytest.raises(ConfigError, match=r"a password or a token; got special_tokens_map\.json"):
            pack(model, title="tiny", say=print)
    (model / "special_tokens_map.json").write_text("{}")
    with (model / "README.md").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ConfigError, match=r"README\.md: larger than"):
        pack(model, title="tiny", say=print)


def test_a_model_is_sent_with_all_its_templates_and_not_without_its_weights(tmp_path: Path) -> None:
    model = tiny.build(tmp_path, answers=(2, 3)).model
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    sent = set(pack(model, title="tiny", say=print).files)
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= sent
    assert "additional_chat_templates/tool_use.jinja" in sent
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 missing: lm_head.weight"):
        pack(model, title="tiny", say=print)
