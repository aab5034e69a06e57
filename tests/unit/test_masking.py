"""Passwords and tokens are masked in every message, and refused where they would be kept."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from seqaware.config.loading import load_config
from seqaware.errors import ConfigError, DataError
from seqaware.masking import holds_secret, masked

SECRET = "QQpa55wordQQ"
# Assembled here, so that no scanner of sources takes them for real ones.
TOKEN = "hf_" + "QQ" * 17
W_AND_B = "0123456789abcdef" * 2 + "89abcdef"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://user:{SECRET}@host/rows.jsonl", "https://***@host/rows.jsonl"),
        (f"https://{SECRET}@host/x", "https://***@host/x"),
        (f"https:/user:{SECRET}@host/x", "https:/***@host/x"),
        (f"s3://key:{SECRET}@bucket/x and more", "s3://***@bucket/x and more"),
        (f"https://host/x?token={SECRET}&page=2", "https://host/x?token=***&page=2"),
        (f"https://host/x?page=2&access_token={SECRET}", "https://host/x?page=2&access_token=***"),
        (
            f"s3://b/x?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
            "s3://b/x?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        (f"got {TOKEN}, which is", "got ***, which is"),
        (f"http://user:a/{SECRET}@host/x", "http://***@host/x"),
        (f"http://user:a@{SECRET}@host/x", "http://***@host/x"),
        (f"mysql+pymysql://user:{SECRET}@host/db", "mysql+pymysql://***@host/db"),
        (f"https://u:{SECRET}@h/x and https://u:{SECRET}@h/y", "https://***@h/x and https://***@h/y"),
        ("glpat-" + "Q" * 20, "***"),
        ("glpat-" + "Q-_x" * 6 + ".01", "***.01"),
        ("wandb_v1_" + "Qx" * 30, "***"),
        ("xoxb-" + "1234-" * 4, "***"),
    ],
)
def test_what_is_secret_is_found_and_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert holds_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        f"--set token={SECRET}",
        f"'password={SECRET}'",
        f"HF_TOKEN={SECRET} api_key={SECRET}",
        f"WANDB_API_KEY={SECRET}",
        f"MLFLOW_TRACKING_PASSWORD={SECRET}",
        f"password: {SECRET}",
        f"{{'api_key': '{SECRET}', \"auth_token\": \"{SECRET}\"}}",
    ],
)
def test_what_is_assigned_is_masked(text: str) -> None:
    assert SECRET not in masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "openai/gsm8k",
        "/data/rows.jsonl",
        "https://huggingface.co/datasets/openai/gsm8k?row=3",
        "user@host:/path",
        "host:/path/user@x.json C:/user@x.json",
        "eos_token=</s>, pad_token=<pad>",
        "Password={answer}",
        "Password: {answer}",
        "unknown token: x",
        "the password:\n  x",
        "https://host:8080/path@main/x",
        "https://huggingface.co/org/model@main/x",
        "revision 0123456789abcdef0123456789abcdef01234567",
        "max_tokens=200; tokens=3",
        "the key 'question' = x",
        "hf_home",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text
    assert not holds_secret(text)


def test_every_error_is_masked() -> None:
    url = f"https://user:{SECRET}@host/x"
    error = DataError(f"not found: {url}", got=url, do=f"look at {url}")
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again):
        assert SECRET not in f"{each} {each.what} {each.got} {each.do} {each!r}"
        assert str(each).count("https://***@host/x") == 3


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("dataset.name", {"dataset": {"name": f"https://user:{SECRET}@host/rows.jsonl"}}),
        ("dataset.mixture.1.name", {"dataset": {"mixture": [{"name": "a"}, {"name": f"http://h/r?token={SECRET}"}]}}),
        ("dataset.columns.question", {"dataset": {"name": "a", "columns": {"question": f"ftp://{SECRET}@host"}}}),
        ("model.base_name", {"model": {"base_name": f"https://{SECRET}@host/model"}}),
        ("output.dir", {"output": {"dir": f"s3://key:{SECRET}@bucket/run"}}),
        ("model.revision", {"model": {"base_name": "a", "revision": TOKEN}}),
        ("logging.project", {"logging": {"project": W_AND_B}}),
        ("logging.mlflow_uri", {"logging": {"mlflow_uri": f"http://u:a/{SECRET}@h/"}}),
        (
            "model.from_scratch.api_key",
            {"model": {"from_scratch": {"model_type": "llama", "api_key": SECRET}, "tokenizer": "t"}},
        ),
        (
            "model.from_scratch.wandb_api_key",
            {"model": {"from_scratch": {"model_type": "llama", "wandb_api_key": SECRET}, "tokenizer": "t"}},
        ),
        (
            "a key of model.from_scratch",
            {"model": {"from_scratch": {"model_type": "llama", TOKEN: 1}, "tokenizer": "t"}},
        ),
        ("a key of dataset.columns", {"dataset": {"name": "a", "columns": {TOKEN: "question"}}}),
    ],
)
def test_a_config_that_holds_a_secret_is_refused_by_key(tmp_path: Path, key: str, change: dict[str, Any]) -> None:
    config = {"model": {"base_name": "a"}, "dataset": {"name": "b"}, **change}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"(holds|is) a password or a token") as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{key} ")
    assert not any(secret in str(refused.value) for secret in (SECRET, TOKEN, W_AND_B))


def test_a_revision_and_a_column_are_no_secrets(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    model = {"base_name": f"/cache/snapshots/{W_AND_B}/", "revision": W_AND_B}
    path.write_text(json.dumps({"model": model, "dataset": {"name": "b", "columns": {"password": "text"}}}))
    assert load_config(path).model.revision == W_AND_B


def test_an_override_is_judged_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {base_name: a}\ndataset: {name: b}\n")
    with pytest.raises(ConfigError, match=r"dataset\.name holds a password"):
        load_config(path, [f"dataset.name=https://user:{SECRET}@host/x"])
    for wrong in (f"nonsense.token={SECRET}", f"token={SECRET}", f"model.base_name.x=https://u:{SECRET}@h"):
        with pytest.raises(ConfigError) as refused:
            load_config(path, [wrong])
        assert SECRET not in str(refused.value)


def test_templates_may_speak_of_passwords(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    form = {"prompt_template": "Set token=abc, password={question}? key=1", "answer_template": "api_key={answer}"}
    path.write_text(json.dumps({"model": {"base_name": "a"}, "dataset": {"name": "b"}, "format": form}))
    assert load_config(path).format.prompt_template == form["prompt_template"]
