"""`launcher/analyse.py` on a tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import launch, tiny


def test_samples_of_a_prompt_as_json_picture_and_page(tmp_path: Path) -> None:
    workshop = tiny.build(tmp_path, answers=(2,))
    out = tmp_path / "out"
    command = ["launcher/analyse.py", str(workshop.model), "--prompt", "Q: one plus", "-n", "40", "--out", str(out)]
    done = launch.forked(*command, "--max-new-tokens", "5", ranks=1)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "analysis.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(workshop.model)
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    ids = tokenizer("Q: one plus", return_tensors="pt").input_ids
    with torch.no_grad():
        p = torch.softmax(model(ids).logits[0, -1].double(), -1)
    first = found["first_token"][0]
    assert first["probability"] == pytest.approx(float(p.max()), rel=1e-5)
    assert first["token"] == tokenizer.decode([int(p.argmax())])
    # All samples begin with the same distribution, and go their own ways.
    assert found["steps"][0]["entropy"] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)
    assert found["steps"][0]["entropy_sd"] == pytest.approx(0.0, abs=1e-5)
    assert found["steps"][0]["samples"] == found["samples"] == 40 and found["steps"][0]["distinct_tokens"] > 3
    assert (
        found["tokens"]
        == sum(step["samples"] for step in found["steps"])
        == sum(len(text["entropy"]) for text in found["texts"])
    )
    cut = sum(len(text["entropy"]) == 5 for text in found["texts"])
    assert found["at_the_limit"] == cut and (f"; {cut} cut at 5 tokens" in done.stdout) == (cut > 0)
    text = found["texts"][0]
    assert text["log_probability"] == pytest.approx(sum(map(math.log, text["probability"])), rel=1e-6)
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "analysis.html").read_text()
    assert not re.search(r"<script|(src|href)=.https?:", page) and "data:image/png;base64," in page
    assert "&#34;" in page and "\\u0" not in page  # tokens in quotes, as they are
