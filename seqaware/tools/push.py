"""A trained model to the Hugging Face hub: what is sent, and the sending, in one commit.

The token comes from the environment alone, goes into a header and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from seqaware.config.model_config import ModelConfig
from seqaware.errors import ConfigError, SeqawareError
from seqaware.files import JSON_BYTES, MalformedError, read_json, read_text
from seqaware.masking import holds_secret
from seqaware.models.model_source import check_model_source
from seqaware.tools.model_card import bare_card, run_card
from seqaware.tools.whole_model import is_adapter, is_checkpoint, is_model, whole_model

TOKEN = "HF_TOKEN"
_MODEL_FILES = (
    *("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "README.md"),
)
_RUN_FILES = ("config.yaml", "plan.json", "manifest.json", "metrics.jsonl", "certificate.json")
# Of a line that is read at once, and of what of it is read again with the next piece.
_PIECE, _LONGEST_SECRET = 2**20, 1000
_TEXTS = (".json", ".jsonl", ".yaml", ".md", ".txt", ".jinja", "")


class ShareError(SeqawareError):
    """The hub did not take what was sent."""


@dataclass(frozen=True)
class Parcel:
    """What is sent: files by their name in the repository, and the card."""

    files: Mapping[str, Path]
    card: str

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values()) + len(self.card.encode())

    def lines(self) -> list[str]:
        """Name and size of everything that is sent."""
        sizes = {"README.md": len(self.card.encode())} | {n: p.stat().st_size for n, p in self.files.items()}
        return [f"{size:>15,}  {name}" for name, size in sizes.items()]


def pack(source: Path, *, title: str, say: Callable[[str], None]) -> Parcel:
    """The model of a run or of a checkpoint with what tells about it, or a model folder by itself.

    Nothing else of the folder is sent.

    Raises:
        ConfigError, CheckpointError: there is no model, or a file holds a password or a token.
    """
    if not source.is_dir():
        raise ConfigError("there is no such folder", got=source, do="name a run's folder or a model's")
    checkpoint = source.absolute() if is_checkpoint(source) and not is_model(source) else None
    if checkpoint is not None:
        run, model = checkpoint.parent.parent, Path(whole_model(str(checkpoint), say=say))
    else:
        run = source if is_model(source / "model") else source.parent
        model = source / "model" if run == source else source
    if not is_model(model):
        do = "name a finished run, a checkpoint, or a Hugging Face folder"
        raise ConfigError("this folder holds no model that could be shared", got=source, do=do)
    _check_weights(model, say)
    found = [path for pattern in _MODEL_FILES for path in sorted(model.glob(pattern)) if path.is_file()]
    files = {path.relative_to(model).as_posix(): path for path in found}
    own = files.pop("README.md", None)
    is_record = (run / "manifest.json").is_file() and (run / "config.yaml").is_file()
    if is_record and (checkpoint is not None or model == run / "model"):
        evaluated = f"evaluations/{checkpoint.name if checkpoint else '*'}/*.json"
        patterns = (*_RUN_FILES, evaluated)
        found = [path for pattern in patterns for path in sorted(run.glob(pattern)) if path.is_file()]
        files |= {f"training/{path.relative_to(run).as_posix()}": path for path in found}
        card = run_card(run, title=title, sent=list(files), checkpoint=checkpoint)
    else:
        card = _own_card(own) if own is not None else bare_card(title)
    _check_secrets(files, card)
    return Parcel(files, card)


def _check_weights(model: Path, say: Callable[[str], None]) -> None:
    if is_adapter(model):
        return
    check_model_source(ModelConfig(base_name=str(model)))
    if "auto_map" in read_json(model / "config.json"):
        say("weights     not checked: this model brings code of its own")
        return
    # Here, because transformers takes seconds to import.
    from seqaware.models.model import check_model_folder

    check_model_folder(model)


def _own_card(path: Path) -> str:
    try:
        return read_text(path, limit=JSON_BYTES)
    except MalformedError as error:
        raise ConfigError("the model's README.md cannot be shared", got=f"{path}: {error}") from error


def _check_secrets(files: Mapping[str, Path], card: str) -> None:
    texts = {name: path for name, path in files.items() if path.suffix in _TEXTS and "tokenizer" not in name}
    told = [name for name, path in texts.items() if _holds_secret(path)]
    if told or holds_secret(card):
        do = "take it out of the file before it is shared, and revoke it"
        raise ConfigError("what would be shared holds a password or a token", got=", ".join(told) or "README.md", do=do)


def _holds_secret(path: Path) -> bool:
    before = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while text := file.readline(_PIECE):
            if holds_secret(before + text):
                return True
            before = "" if text.endswith("\n") else text[-_LONGEST_SECRET:]
    return False


def check_repository(name: str) -> None:
    """Refuse what is no owner/name.

    Raises:
        ConfigError: it is not.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError("REPO is no name of a repository", got=name, do="write owner/name") from error
    if name.count("/") != 1:
        raise ConfigError("REPO needs its owner", got=name, do="write owner/name")


def token_in(environment: Mapping[str, str]) -> str:
    """The hub's token.

    Raises:
        ConfigError: there is none.
    """
    token = environment.get(TOKEN, "").strip()
    if not token:
        do = f"make one that may write at https://huggingface.co/settings/tokens, and export {TOKEN}=…"
        raise ConfigError(f"no token for the hub: {TOKEN} is not set", do=do)
    return token


def push(parcel: Parcel, repository: str, *, token: str, public: bool, say: Callable[[str], None]) -> str:
    """Create the repository if it is not there, and send everything in one commit. Returns the commit's address.

    Raises:
        ShareError: the hub refuses, cannot be reached, or has the repository with another visibility.
    """
    api = HfApi(token=token, library_name="seqaware")
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise ShareError(
                f"{repository} is there already, and public", do="name another repository, or write --public"
            )
        say(f"repository  {address}")
        operations = [CommitOperationAdd("README.md", parcel.card.encode())]
        operations += [CommitOperationAdd(name, path) for name, path in parcel.files.items()]
        commit = api.create_commit(
            repository, operations, commit_message="Model, card and training record, by seqaware"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        told = " ".join(str(error).replace(token, "***").split())[:400]
        do = f"check that {TOKEN} may write there, and the network (HF_ENDPOINT)"
        raise ShareError(f"the hub did not take {repository}", got=told, do=do) from None
    return str(commit.commit_url)
