"""A saved model's folder has all that inference needs: tokenizer, the template that was used, where answers end."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from seqaware.checkpoint.engine_export import put_in_place
from seqaware.data.chat import InferenceTokenizer
from tests.small_tokenizers import CHATML, CHATML_MARKED, PLAIN, byte_level
from tests.unit.models.tiny_models import VOCABULARY, tiny

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "12+30=42"}]


@pytest.mark.parametrize(("own", "written"), [(None, CHATML_MARKED), (CHATML, None), (PLAIN, CHATML), (CHATML, PLAIN)])
def test_the_template_and_the_ends_of_answers_are_saved(tmp_path: Path, own: str | None, written: str | None) -> None:
    tokenizer, model = byte_level(chat_template=own, adds_bos=True), tiny("llama")
    model.generation_config = GenerationConfig(eos_token_id=70, do_sample=True, temperature=0.5)
    put_in_place(tmp_path / "model", InferenceTokenizer.of(tokenizer, written), model.save_pretrained)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    used = written or own
    assert loaded.chat_template == used == (tmp_path / "model" / "chat_template.jinja").read_text()
    assert (
        loaded.apply_chat_template(TALK)["input_ids"]
        == tokenizer.apply_chat_template(TALK, chat_template=used)["input_ids"]
    )
    assert loaded.special_tokens_map == tokenizer.special_tokens_map and loaded("hello").input_ids[0] == 1
    assert tokenizer.chat_template == own  # the run's tokenizer stays as it is
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    closing = [] if used == PLAIN else [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert settings.eos_token_id == [70, tokenizer.eos_token_id, *closing]
    assert settings.do_sample and settings.temperature == 0.5


def test_generation_stops_where_a_turn_ends(tmp_path: Path) -> None:
    tokenizer, model = byte_level(chat_template=CHATML), tiny("llama")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    put_in_place(tmp_path / "model", InferenceTokenizer.of(tokenizer, None), model.save_pretrained)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    ids %= VOCABULARY  # any prompt serves
    said = saved.generate(ids, max_new_tokens=5, do_sample=False, sequence_bias={(end,): 100.0})
    answer = said[0, ids.shape[1] :]
    assert answer.tolist() == [end]
    # transformers 4 would derive them from the model's config, which knows one end only.
    assert not saved.generation_config._from_model_config


def test_an_adapters_folder_has_no_generation_config(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")

    put_in_place(tmp_path / "model", InferenceTokenizer.of(byte_level(), CHATML), write)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
