"""`surgeon export --gguf`: what unmodified llama.cpp computes from the file, against transformers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers.masking import kept_channels, mask
from helpers.tiny_gguf import PROMPT, llama_cpp_logprobs, llama_cpp_server
from helpers.tiny_models import CALIBRATION, byte_tokenizer, opened, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import surgery.loading  # noqa: F401
from surgery.checkpoint.gguf import GgufCheckpoint
from surgery.checkpoint.gguf_file import GgufFile
from surgery.export import quantiser, vocabulary

WIDTHS = {"per_layer_config": {0: {"intermediate_size": 32}, 2: {"intermediate_size": 64}}}
ROWS = 270  # of the embedding: more than the tokenizer has tokens
LONG: dict[str, Any] = {"max_position_embeddings": 256, "num_hidden_layers": 4}
ROPE = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.9,
        "beta_fast": 16.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture
def save_gguf_tiny(save_tiny: Callable[..., Path]) -> Callable[..., Path]:
    """A tiny model with the usual tokenizer and one merge, as transformers' reader of GGUF wants one."""

    def save(family: str, **changes: Any) -> Path:
        folder = save_tiny(family, **{"vocab_size": ROWS, **changes})
        parts = json.loads(byte_tokenizer().backend_tokenizer.to_str())
        vocab = {token: i for token, i in parts["model"]["vocab"].items() if i < 256}
        parts["model"] |= {"vocab": {**vocab, "ab": 256}, "merges": [["a", "b"]]}
        parts["added_tokens"] = []
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>", eos_token="</s>"
        )
        tokenizer.save_pretrained(folder)
        return folder

    return save


def transformers_logprobs(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].float(), -1)


def assert_same(folder: Path, file: Path, tolerance: float = 1e-3) -> None:
    """Log-probabilities of all tokens after the prompt, relative to the largest."""
    expected = transformers_logprobs(folder)
    found = llama_cpp_logprobs(file, tokens=len(expected))
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("layers", ["uniform", "uneven"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": ROPE["llama3"]}),
        ("llama-tied-bias", {"attention_bias": True, "rope_parameters": ROPE["yarn"]}),
        ("mistral", {"sliding_window": None, "head_dim": 16, "rope_parameters": ROPE["linear"]}),
        ("qwen2", {}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(
    family: str,
    changes: dict[str, Any],
    layers: str,
    save_gguf_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
) -> None:
    folder = save_gguf_tiny(family, **LONG, **changes, **(WIDTHS if layers == "uneven" else {}))
    surgeon("export", str(folder), "--gguf", "--type", "f32", "--out", "tiny.gguf", "--quiet")
    file = Path("tiny.gguf")
    wanted = "deci" if layers == "uneven" else "qwen2" if family == "qwen2" else "llama"
    assert GgufFile(file).architecture == wanted
    assert_same(folder, file)


def test_qwen3_goes_out_and_every_tensor_comes_back(
    save_gguf_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_gguf_tiny("qwen3", **LONG)
    surgeon("export", str(folder), "--gguf", "--type", "f32")
    made = Path("tiny-GGUF")
    manifest = json.loads((made / "surgeon.json").read_text())
    file = made / manifest["gguf"]["file"]
    assert_same(folder, file)
    back, stored = GgufCheckpoint(file, torch.float32), load_file(folder / "model.safetensors")
    assert {*back.tensors} == {*stored}
    assert all(torch.equal(back.read(name), tensor) for name, tensor in stored.items())
    card = (made / "README.md").read_text()
    assert file.name in card and "architecture of llama.cpp | `qwen3`" in card


def test_layers_without_attention(save_gguf_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    folder = save_gguf_tiny("llama", **LONG)
    cut = ("--drop-attention", "1,3", "--sparsity", "0.5", "--multiple-of", "8", "--repair", "none")
    surgeon("prune", str(folder), *cut, *CALIBRATION, "--allocation", "score", "--out", "free", "--quiet")
    shown = surgeon("export", "free", "--gguf", "--type", "f32", "--out", "free.gguf")
    assert GgufFile(Path("free.gguf")).architecture == "deci" and "left out: 2 tensors" in shown.stdout
    model = AutoModelForCausalLM.from_pretrained(folder)
    for number in (1, 3):
        model.model.layers[number].self_attn.o_proj.weight.data.zero_()
    meta_model = opened(folder).meta_model
    kept = kept_channels(json.loads(Path("free/surgeon.json").read_text()))
    mask(model, meta_model.family.sites, meta_model.layers_path, kept)
    with torch.no_grad():
        logits = model.float().eval()(torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.log_softmax(logits.float(), -1)
    found = llama_cpp_logprobs(Path("free.gguf"), tokens=ROWS)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_window_becomes_the_context_length(
    save_gguf_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_gguf_tiny("mistral", **LONG, sliding_window=220)
    shown = surgeon("export", str(folder), "--gguf", "--type", "f32", "--out", "w.gguf")
    assert "context length 220 tokens in place of 256" in shown.stdout
    assert GgufFile(Path("w.gguf")).metadata["llama.context_length"] == 220
    assert_same(folder, Path("w.gguf"))


WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, **LONG}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("q8_0", {"Q8_0"}),
        ("q4_k_m", {"Q4_K", "Q6_K"}),
        ("q2_k", {"Q2_K", "Q3_K", "Q6_K"}),
        ("iq4_xs", {"IQ4_XS", "Q6_K"}),
    ],
)
def test_quantised_types_load_and_super_weights_stay(
    kind: str, expected: set[str], save_gguf_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_gguf_tiny("llama", **WIDE)
    weights = [{"layer": 1, "row": 3, "column": 5, "value": 9.0}, {"layer": 2, "row": 0, "column": None}]
    (folder / "surgeon.json").write_text(json.dumps({"schema_version": 1, "super_weights": weights}))
    shown = surgeon("export", str(folder), "--gguf", "--type", kind, "--out", "q.gguf")
    assert f"blk.1.ffn_down.weight is F32, not {kind[:4].upper().replace('Q8_0', 'Q8_0')}" in shown.stdout
    file = GgufFile(Path("q.gguf"))
    assert {t.kind for t in file.tensors.values() if len(t.shape) > 1} - {"F32"} == expected
    # surgeon's own decoder reads what llama.cpp's encoder wrote, close to the weights
    back, stored = GgufCheckpoint(Path("q.gguf"), torch.float32), load_file(folder / "model.safetensors")
    bound = {"q8_0": 0.01, "q4_k_m": 0.1, "q2_k": 0.4, "iq4_xs": 0.1}[kind]
    for name, tensor in stored.items():
        assert (back.read(name) - tensor).norm() < bound * tensor.norm(), name
    assert torch.equal(
        back.read("model.layers.1.mlp.down_proj.weight"), stored["model.layers.1.mlp.down_proj.weight"]
    )
    found = llama_cpp_logprobs(Path("q.gguf"), tokens=ROWS)
    assert bool(torch.isfinite(found).all())


def test_without_llama_cpp_the_gguf_package_rounds(
    save_gguf_tiny: Callable[..., Path], surgeon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_gguf_tiny("llama", **WIDE)
    kinds = ("q8_0", "q4_0")
    for kind in kinds:
        surgeon("export", str(folder), "--gguf", "--type", kind, "--out", f"cpp-{kind}.gguf")
    monkeypatch.setattr(quantiser, "_from_llama_cpp", lambda: None)
    refused = surgeon("export", str(folder), "--gguf", "--type", "q4_k_m", code=1)
    assert "xllamacpp" in refused.stderr and "q8_0" in refused.stderr
    for kind in kinds:
        surgeon("export", str(folder), "--gguf", "--type", kind, "--out", f"py-{kind}.gguf")
        ours, theirs = (GgufFile(Path(f"{who}-{kind}.gguf")) for who in ("py", "cpp"))
        name = "blk.0.ffn_up.weight"
        read = [file.read(file.tensors[name], torch.float32) for file in (ours, theirs)]
        assert (read[0] - read[1]).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", WIDTHS, "prune with --allocation uniform"),
        ("gemma", {}, "convert_hf_to_gguf.py"),
        ("llama", {"per_layer_config": {1: {"intermediate_size": 0}}}, "attention and no FFN"),
        ("llama", {"hidden_act": "gelu"}, "found gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("qwen2", {"per_layer_config": {1: {"rms_norm_eps": 1.0}}}, "rms_norm_eps"),
    ],
)
def test_refused_before_a_weight_is_read(
    family: str,
    changes: dict[str, Any],
    message: str,
    save_tiny: Callable[..., Path],
    surgeon: Callable[..., Any],
) -> None:
    folder = save_tiny(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    refused = surgeon("export", str(folder), "--gguf", code=1)
    assert message in refused.stderr
    assert not Path("tiny-GGUF").exists()


def test_usage(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> None:
    folder = save_tiny("llama")
    assert "give --gguf" in surgeon("export", str(folder), code=2).stderr
    assert "q4_k_m" in surgeon("export", str(folder), "--gguf", "--type", "iq1_s", code=2).stderr
    shown = surgeon("export", str(folder), "--gguf", "--dry-run", "--json")
    assert json.loads(shown.stdout)["types"]["token_embd.weight"] == "F16"
    Path("there.gguf").write_bytes(b"")
    surgeon("export", str(folder), "--gguf", "--out", "there.gguf", code=1)
    assert Path("there.gguf").read_bytes() == b""


def test_weights_that_are_no_numbers_leave_nothing(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused = surgeon("export", str(folder), "--gguf", "--type", "f16", "--out", "x.gguf", code=1)
    assert "too large for F16" in refused.stderr and "1e+06" in refused.stderr
    assert not [*Path().glob("*x.gguf*")]


HARD = "I've 1234 US$  spaces\t\n\n  and ÄÖß naïve 東京 🚀 <|end|>'LL x=3.14\r\n"


def trained(pattern: str, license_text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens that splits text by a pattern of PATTERNS; or SentencePiece's."""
    if pattern == "sentencepiece":
        alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=alphabet, max_token_length=6, show_progress=False
        )
        tokenizer.train_from_iterator(license_text.split("\n"), trainer)
        tokenizer = whole_merges(tokenizer)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    splits = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "digits, gpt-2": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
    }.get(pattern) or [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = Tokenizer(models.BPE(ignore_merges=vocabulary.PATTERNS[pattern][1]))
    tokenizer.pre_tokenizer = splits[0] if len(splits) == 1 else pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([license_text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<|end|>"])
    return fast


def whole_merges(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a merge for every pair of pieces, as converters make them of SentencePiece's."""
    parts = json.loads(tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    pairs = []
    for piece in sorted((p for p in vocab if not p.startswith("<")), key=lambda p: vocab[p]):
        pairs += [
            [piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab
        ]
    parts["model"]["merges"] = pairs
    return Tokenizer.from_str(json.dumps(parts))


def llama_cpp_tokens(server: Any, text: str) -> list[int]:
    """The tokens of a text without special ones around it, from the server's own address on this machine."""
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: list[int] = json.loads(answer.read())["tokens"]
    return found


@pytest.mark.parametrize("pattern", [*vocabulary.PATTERNS, "sentencepiece"])
def test_llama_cpp_splits_text_alike(
    pattern: str, tmp_path: Path, surgeon: Callable[..., Any], license_text: str
) -> None:
    tokenizer = trained(pattern, license_text)
    rows = len(tokenizer) + 5
    tiny_model("llama", num_hidden_layers=1, vocab_size=rows, bos_token_id=0, eos_token_id=1).save_pretrained(
        tmp_path / "tiny"
    )
    tokenizer.save_pretrained(tmp_path / "tiny")
    surgeon("export", str(tmp_path / "tiny"), "--gguf", "--type", "f16", "--out", "t.gguf", "--quiet")
    server = llama_cpp_server(Path("t.gguf"))
    for text in (HARD, license_text[:400]):
        assert llama_cpp_tokens(server, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_unknown_to_llama_cpp_is_refused(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any]
) -> None:
    folder = save_tiny("llama")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    assert "[aeiou]" in surgeon("export", str(folder), "--gguf", code=1).stderr


def test_the_names_are_those_of_the_gguf_package() -> None:
    """The reader's tables, which the export turns around, and gguf's own map."""
    from surgery.checkpoint.gguf_families import FAMILIES
    from surgery.export.architecture import ARCHITECTURES

    for architecture in {*ARCHITECTURES.values()}:
        known = gguf.get_tensor_name_map(
            next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), 4
        )
        for ours, template in FAMILIES[architecture].names.items():
            assert known.get_name(template.replace("{}", "2")) == ours.replace("{}", "2")
