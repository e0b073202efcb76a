"""A smaller vocabulary against the whole one: logits of the tokens that stay, and files that load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fp8 import add_tensors
from helpers.tiny_models import CALIBRATION, opened, tiny_model
from helpers.tokenizers_made import fast_tokenizer, text
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from surgery.cut.groups import Cut
from surgery.cut.planned_model import check_planned
from surgery.cut.vocabulary import check_vocabulary, onto, vocabulary_tensors
from surgery.errors import CheckpointError, PlanError, UnsupportedModelError
from surgery.plan.kind_plan import VOCABULARY, KindPlan
from surgery.pruning.verify_tokenizer import STRANGE, check_tokenizer
from surgery.pruning.vocabulary import plan_vocabulary
from surgery.vocabulary.files import vocabulary_files
from surgery.vocabulary.kept_ids import ids_of

TOKENS, ROWS = 700, 704  # the embedding has rows that no token has
IDS = {"vocab_size": ROWS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model with a tokenizer of TOKENS tokens, and a text to count; returns the folder."""

    def save(family: str, kind: str = "byte-level", **changes: Any) -> Path:
        folder = tmp_path / "source"
        tiny_model(family, **{**IDS, **changes}).save_pretrained(folder)
        fast_tokenizer(kind, TOKENS).save_pretrained(folder)
        (tmp_path / "text.txt").write_text(text())
        return folder

    return save


def cut_vocabulary(folder: Path, keep: float, **options: Any) -> tuple[Path, list[int], dict[str, Any]]:
    """(Folder of the same model with a smaller vocabulary and all channels, old ids that stay, manifest)."""
    model, words = surgery.open_model(folder, dtype="float32"), str(folder.parent / "text.txt")
    part = plan_vocabulary(model, keep, [words])
    index = surgery.build_index(model, text=words, blocks=2, block_size=24)
    plan = surgery.plan_pruning(model, index, **{"sparsity": 0.0, **options})
    surgery.prune(model, index, replace(plan, cuts=(part,)), folder.parent / "cut")
    manifest = json.loads((folder.parent / "cut" / "surgeon.json").read_text())
    return folder.parent / "cut", part.kept[VOCABULARY].tolist(), manifest


@pytest.mark.parametrize("family", ["llama", "phi", "deepseek_v3"])
def test_logits_are_those_of_the_tokens_that_stay(family: str, save_model: Callable[..., Path]) -> None:
    source = save_model(family)
    cut, kept, manifest = cut_vocabulary(source, 500)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, cut))
    assert after.config.vocab_size == len(kept) == 500
    old = torch.tensor(kept)[torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(2))]
    with torch.no_grad():
        expected = before(old).logits[..., kept]
        found = after(torch.searchsorted(torch.tensor(kept), old)).logits
    assert torch.allclose(found, expected, atol=1e-4)
    words = [AutoTokenizer.from_pretrained(folder) for folder in (source, cut)]
    assert len(words[1]) == 500
    for strange in STRANGE:
        assert words[1].decode(words[1](strange)["input_ids"]) == words[0].decode(
            words[0](strange)["input_ids"]
        )
    for config in (after.config, after.generation_config):
        assert config.bos_token_id == words[1].bos_token_id == kept.index(1)
        assert config.eos_token_id == words[1].eos_token_id == kept.index(2)
    generated = after.generate(words[1]("The work", return_tensors="pt")["input_ids"], max_new_tokens=4)
    assert int(generated.max()) < 500
    said = manifest["plan"]["cuts"]["vocab"]
    assert ids_of(said["kept_ids"]) == kept
    assert said["before"] == ROWS and said["texts"][0]["name"] == "text.txt"
    assert 0.5 < said["texts"][0]["covered"] < 1 < said["texts"][0]["lengthening"] < 2


@pytest.mark.parametrize("kind", ["byte fallback", "unigram"])
def test_with_channels_and_other_tokenizers(kind: str, save_model: Callable[..., Path]) -> None:
    source = save_model("qwen2", kind)
    cut, kept, manifest = cut_vocabulary(source, 0.8, sparsity=0.5, multiple_of=8, repair="lstsq")
    assert len(kept) == round(0.8 * TOKENS)
    model = AutoModelForCausalLM.from_pretrained(cut)
    assert model.config.intermediate_size == 24 and model.config.vocab_size == len(kept)
    assert manifest["measurements"]["verification"]["relative_difference"] < 1e-4
    words = AutoTokenizer.from_pretrained(cut)
    # what the chat template writes stays, whatever the text uses
    chat = words.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    whole = AutoTokenizer.from_pretrained(source)
    ids = whole(chat, add_special_tokens=False)["input_ids"]
    assert [kept[one] for one in words(chat, add_special_tokens=False)["input_ids"]] == ids


def test_other_forms_of_the_vocabulary_follow_or_stay_behind(save_model: Callable[..., Path]) -> None:
    source = save_model("llama")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    part = plan_vocabulary(surgery.open_model(source), 500, [str(source.parent / "text.txt")])
    files, left_out = vocabulary_files(opened(source).checkpoint, part.kept[VOCABULARY].tolist())
    model = json.loads(files["tokenizer.json"])["model"]
    assert json.loads(files["vocab.json"]) == model["vocab"] and max(model["vocab"].values()) < 500
    assert files["merges.txt"].splitlines()[1:] == [" ".join(pair) for pair in model["merges"]]
    assert left_out == ["tokenizer.model"]


def test_rows_beside_the_model_follow(save_model: Callable[..., Path]) -> None:
    source = save_model("deepseek_v3")
    rows = torch.randn(ROWS, 32)
    add_tensors(source, {"mtp.embed_tokens.weight": rows, "mtp.other.weight": torch.randn(3, 32)})
    meta_model = opened(source).meta_model
    assert set(vocabulary_tensors(meta_model)) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "mtp.embed_tokens.weight",
    }
    kept = torch.cat([torch.arange(300), torch.arange(300, TOKENS, 2)])
    part = KindPlan("vocab", {VOCABULARY: kept})
    cut = onto(meta_model, Cut((), {}, {}, meta_model.checkpoint.config), part)
    check_planned(meta_model, cut)
    assert torch.equal(cut.edits["mtp.embed_tokens.weight"].apply(rows), rows[kept])
    add_tensors(source, {"mtp.d2t": torch.randn(ROWS)})
    with pytest.raises(UnsupportedModelError, match=r"mtp\.d2t"):
        check_vocabulary(opened(source).meta_model)


def test_what_cannot_be_cut_is_refused_by_name(save_model: Callable[..., Path]) -> None:
    source = save_model("llama")
    model, words = opened(source), str(source.parent / "text.txt")
    for keep, message in ((10, "more tokens must stay"), (701, "can't be cut to"), (0, "can't be cut to")):
        with pytest.raises(PlanError, match=message):
            plan_vocabulary(model, keep, [words])
    part = plan_vocabulary(model, 500, [words])
    wrong = part.kept[VOCABULARY].clone()
    wrong[-1] = TOKENS - 1 if int(wrong[-1]) != TOKENS - 1 else int(wrong[-1]) - 1
    with pytest.raises(CheckpointError, match="another id"):
        check_tokenizer(AutoTokenizer.from_pretrained(source), model, wrong)
    fields = json.loads((source / "tokenizer.json").read_text())
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": ROWS, "content": "<late>"})
    (source / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match=r"without a row.*<late>"):
        check_vocabulary(opened(source).meta_model)
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    with pytest.raises(UnsupportedModelError, match=r"there is none.*tokenizer.model"):
        check_vocabulary(opened(source).meta_model)


def test_the_command_says_what_stays_and_which_options_clash(
    save_model: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    source = save_model("llama")
    options = ["--keep-vocabulary", "500", "--vocabulary-text", "text.txt", "--out", "cut", *CALIBRATION]
    shown = " ".join(surgeon("prune", str(source), *options).stdout.split())
    assert "Vocabulary 704 → 500 tokens" in shown and "of text.txt's stay" in shown
    manifest = json.loads((source.parent / "cut" / "surgeon.json").read_text())
    assert "--keep-vocabulary 500 --vocabulary-text text.txt" in manifest["command"]
    assert manifest["plan"]["repair"] == "none" and manifest["plan"]["sparsity"] == 0
    card = (source.parent / "cut" / "README.md").read_text()
    assert "Vocabulary 704 → 500 tokens" in card and "most used in\ntext.txt" in card
    refused = surgeon("prune", str(source), *options, "--heal", "1k", code=2)
    assert "--keep-vocabulary, --heal" in refused.stderr
    searched = ["--target-params", "1k", "--cuts", "ffn,vocab"]
    refused = surgeon("prune", str(source), *searched, *CALIBRATION, code=2)
    assert "give --keep-vocabulary too" in refused.stderr
    refused = surgeon("prune", str(source), "--vocabulary-text", "text.txt", *CALIBRATION, code=2)
    assert "give --keep-vocabulary" in refused.stderr
