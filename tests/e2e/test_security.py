"""What comes with models and data is not run, and what is secret is written nowhere: by the real command."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from launcher.prepare import app as prepare
from launcher.train import app
from seqaware.data.store.store_format import MANIFEST, manifest_checksum
from tests import launch, tiny

# Distinctive, so that any trace of them is found, and assembled, so that no scanner of sources takes them for real.
SECRETS = {
    "HF_TOKEN": "hf_" + "QQ1" * 11,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "QQ2" * 11,
    "WANDB_API_KEY": "QQ3" * 13,
    "MLFLOW_TRACKING_PASSWORD": "QQ4-password",
    "AWS_SECRET_ACCESS_KEY": "QQ5/secret/access/key",
    "https_proxy": "http://user:QQ6-proxy@127.0.0.1:9",
}
PASSWORD = "QQ-pa55word"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.build(tmp_path_factory.mktemp("security"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _train(workshop: tiny.Workshop, config: dict[str, Any], *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(workshop.write("config", config)), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _holders(folder: Path, secret: str) -> list[str]:
    """The files that have the secret in their bytes or in what they are called."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if secret in str(path) or secret.encode() in path.read_bytes()]


@pytest.mark.distributed
def test_secrets_of_the_environment_are_written_nowhere(workshop: tiny.Workshop) -> None:
    """Config, plan, manifest, logs, metrics, checkpoints, model, stores, and both outputs of two ranks."""
    config = workshop.config(
        output={"dir": str(workshop.folder / "run"), "save_every": 1},
        evaluation={"dataset": {"name": str(workshop.rows), "store_dir": str(workshop.folder / "stores")}},
    )
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(launch.free_port()))
    path = str(workshop.write("secretive", config))
    done = launch.python("-m", *torchrun, "launcher/train.py", path, **SECRETS)
    assert done.returncode == 0, done.stderr
    run = workshop.folder / "run"
    for name in ("config.yaml", "plan.json", "manifest.json", "metrics.jsonl", "model/config.json"):
        assert (run / name).is_file(), name
    assert list((run / "checkpoints").glob("step-*")) and list((run / "logs").rglob("*.log"))
    for name, secret in SECRETS.items():
        assert _holders(workshop.folder, secret) == [], name
        assert secret not in done.stdout + done.stderr, name


@pytest.mark.parametrize(
    "name",
    [
        f"https://user:{PASSWORD}@host/rows.jsonl",
        f"https://host/rows.jsonl?token={PASSWORD}",
        f"s3://{PASSWORD}@b/rows",
    ],
)
def test_addresses_with_passwords_are_refused_and_not_repeated(workshop: tiny.Workshop, name: str) -> None:
    folder = workshop.folder / "never"
    good = workshop.config(output__dir=str(folder))
    for key, config, arguments in (
        ("dataset.name", {**good, "dataset": {"name": name}}, []),
        ("model.base_name", good, ["--set", f"model.base_name={name}"]),
    ):
        code, output = _train(workshop, config, *arguments)
        assert code == 2 and f"{key} holds a password or a token" in output and "environment" in output, output
        assert PASSWORD not in output and "***" in output
    code, output = _train(workshop, good, "--deepspeed", name)
    assert code == 2 and PASSWORD not in output, output
    assert not folder.exists()


class _Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self._victim), "w"))


def _set(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _write_code(model: Path, victim: Path) -> None:
    """What transformers would run: it makes a file, and has the classes that are asked for."""
    (model / "code.py").write_text(
        f"open({str(victim)!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'planted'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )


def _in_config(model: Path, victim: Path, model_type: str = "planted") -> None:
    _write_code(model, victim)
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    _set(model / "config.json", model_type=model_type, auto_map=classes)


def _in_tokenizer(model: Path, victim: Path) -> None:
    _write_code(model, victim)
    classes = {"AutoTokenizer": [None, "code.Tokenizer"]}
    _set(model / "tokenizer_config.json", tokenizer_class="PlantedTokenizer", auto_map=classes)


def _in_weights(model: Path, victim: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Trap(victim)}, model / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_in_config, "comes with code of its own, which was not run"),
        (_in_tokenizer, "comes with code of its own, which was not run"),
        (_in_weights, "a pickle that asks for more than tensors"),
    ],
)
def test_a_model_that_would_run_code_is_refused(
    workshop: tiny.Workshop, tmp_path: Path, plant: Callable[[Path, Path], None], said: str
) -> None:
    victim, model = tmp_path / "was-run", tmp_path / "model"
    shutil.copytree(workshop.model, model)
    plant(model, victim)
    config = workshop.config(model__base_name=str(model), output__dir=str(tmp_path / "run"))
    code, output = _train(workshop, config)
    assert code == 2 and said in output, output
    assert not victim.exists(), "what was planted was run"


def test_code_of_a_model_that_transformers_knows_is_not_run(workshop: tiny.Workshop, tmp_path: Path) -> None:
    """transformers takes its own Llama; only where it is told to, it takes the code of the folder."""
    victim, model = tmp_path / "was-run", tmp_path / "model"
    shutil.copytree(workshop.model, model)
    _in_config(model, victim, model_type="llama")
    config = workshop.config(model__base_name=str(model), output__dir=str(tmp_path / "run"))
    code, output = _train(workshop, config, "--set", "training.schedule.max_steps=1")
    assert code == 0 and not victim.exists(), output
    AutoConfig.from_pretrained(str(model), trust_remote_code=True)
    assert victim.exists(), "the trap works"


def test_a_store_whose_manifest_names_files_elsewhere(workshop: tiny.Workshop, tmp_path: Path) -> None:
    stores = tmp_path / "stores"
    made = workshop.config(dataset__store_dir=str(stores), output__dir=str(tmp_path / "run"))
    assert CliRunner().invoke(prepare, [str(workshop.write("made", made))]).exit_code == 0
    (store,) = (path for path in stores.iterdir() if path.is_dir())
    (tmp_path / "secret").write_text("secret")
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 6, "sha256": "0" * 64}
    manifest["checksum"] = manifest_checksum(manifest)  # whoever makes a manifest makes its checksum too
    (store / MANIFEST).write_text(json.dumps(manifest))
    other = workshop.config(dataset={"name": str(store)}, output__dir=str(tmp_path / "other"))
    code, output = _train(workshop, other)
    assert code == 2 and "'../../secret': it climbs out of the folder" in output, output
    assert not (tmp_path / "other").exists()


def test_a_pickle_is_no_dataset(workshop: tiny.Workshop, tmp_path: Path) -> None:
    victim = tmp_path / "was-run"
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(_Trap(victim)))
    config = workshop.config(dataset={"name": str(tmp_path / "rows.pkl")}, output__dir=str(tmp_path / "run"))
    code, output = _train(workshop, config)
    assert code == 2 and "of no known kind" in output, output
    assert not victim.exists()
