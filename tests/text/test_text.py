"""Texts as people have them: files, rows, chat and mixtures of any kind, read no further than needed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from click.testing import CliRunner
from helpers.tiny_models import byte_tokenizer, token_blocks
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery.cli.main import main
from surgery.errors import CalibrationError, UsageError
from surgery.text import Text, calibration_text, draw_blocks, first_blocks, open_text
from surgery.text import blocks as blocks_module
from surgery.text.blocks import tokenise


def content(path: Path, **how: Any) -> str:
    return "".join(open_text(str(path), **how).pieces(None))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_blocks_are_seeded_and_cover_the_text(license_text: str) -> None:
    tokenizer = byte_tokenizer()
    every = token_blocks(tokenizer, license_text, "t", block_size=100)
    assert torch.equal(
        every.ids.flatten(), torch.tensor(tokenizer(license_text)["input_ids"][: every.ids.numel()])
    )
    first, again, other = (
        token_blocks(tokenizer, license_text, "t", block_size=100, blocks=8, seed=s) for s in (1, 1, 2)
    )
    assert first.digest == again.digest != other.digest
    rows = {tuple(row) for row in every.ids.tolist()}
    assert all(tuple(row) in rows for row in first.ids.tolist())


def splitting_tokenizer(pattern: str, text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges trained on `text` and the pattern of a known family."""
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3])
def test_pieces_have_the_tokens_of_the_whole_text(
    pattern: str, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = license_text + "\n\nÜber – 漢字 🙂.\n\n\n" + license_text
    tokenizer = splitting_tokenizer(pattern, license_text)
    whole = tokenizer(text, return_offsets_mapping=True)
    monkeypatch.setattr(blocks_module, "PIECE", 700)
    monkeypatch.setattr(blocks_module, "AROUND", 80)
    found = tokenise(tokenizer, (text[i : i + 97] for i in range(0, len(text), 97)), 50, None)
    assert found.ids.tolist() == whole["input_ids"] and found.complete
    for block in range(len(found.ids) // 50):
        ends = [whole["offset_mapping"][block * 50 + i][1] for i in (0, 49)]
        assert [found.starts[block], found.ends[block]] == [len(text[:end].encode()) for end in ends]


def test_a_stream_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless(_: int | None) -> Iterator[str]:
        nonlocal read
        while True:
            read += 1000
            yield "four words of text. " * 50

    text = Text("endless", endless)
    assert first_blocks(byte_tokenizer(), text, block_size=64, blocks=4).ids.shape == (4, 64)
    assert read <= 4 * 64 + 3 * blocks_module.PIECE
    read = 0
    assert draw_blocks(byte_tokenizer(), [text], block_size=64, blocks=4, seed=1).ids.shape == (4, 64)
    assert read <= 4 * 64 * calibration_text.CHOICE * calibration_text.BYTES_PER_TOKEN + 1000
    monkeypatch.setattr(blocks_module, "LARGEST", 100_000)
    with pytest.raises(CalibrationError, match="longer than"):
        first_blocks(byte_tokenizer(), text, block_size=64)


def test_a_large_file_is_sampled_at_seeded_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.log"
    path.write_text("".join(f"Line {number} of the large file.\n" for number in range(20_000)))
    monkeypatch.setattr(calibration_text, "WHOLE", 1000)
    tokenizer = byte_tokenizer()

    def draw(seed: int) -> str:
        text = open_text(str(path))
        drawn = draw_blocks(tokenizer, [text], blocks=4, block_size=64, seed=seed)
        return str(tokenizer.decode(drawn.ids.flatten().tolist()))

    first = draw(1)
    assert first == draw(1) != draw(2)
    numbers = [int(word) for word in first.split() if word.isdigit() and len(word) > 3]
    assert max(numbers) - min(numbers) > 5_000  # from all over the file


ROWS: dict[str, tuple[list[Any], str]] = {
    "null": ([{"text": None}, {"text": "one"}, {"text": "two"}], "one\n\ntwo"),
    "list": ([{"text": ["one", "two"]}, {"text": "three"}], "one\ntwo\n\nthree"),
    "number": ([{"text": 1}, {"text": 2.5}], "1\n\n2.5"),
    "strings": (["one", "two"], "one\n\ntwo"),
    "content": ([{"id": 1, "content": "one"}], "one"),
    "messages": (
        [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}],
        "<user>Why?<assistant>So.",
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}],
        "<user>Why?<assistant>So.",
    ),
    "alpaca": (
        [{"instruction": "Add.", "input": "1 and 2", "output": "3"}],
        "<user>Add.\n\n1 and 2<assistant>3",
    ),
    "completion": ([{"prompt": "Why?", "completion": "So."}], "<user>Why?<assistant>So."),
    "parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}],
        "<user>Why?",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_every_form(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    rows, expected = ROWS[kind]
    assert content(lines(tmp_path / "rows.jsonl", rows), tokenizer=tokenizer) == expected


def test_chat_without_a_template_is_joined_and_a_bad_row_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": role, "content": role} for role in roles]} for roles in (["user"], ["tool"])
    ]
    path = lines(tmp_path / "chat.jsonl", rows)
    assert content(path) == "user\n\ntool"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    text = open_text(str(path), tokenizer)
    assert "".join(text.pieces(None)) == "user"
    assert "no tools" in text.notes[0] and text.notes[0].startswith("1 rows")


def test_text_columns(tmp_path: Path) -> None:
    path = lines(tmp_path / "other.jsonl", [{"label": 1, "body": "here"}])
    with pytest.raises(CalibrationError, match="no text column") as refused:
        content(path)
    assert "label, body" in refused.value.found and "--text-column" in refused.value.next_step
    assert content(path, column="body") == "here"
    with pytest.raises(CalibrationError, match="no such text column"):
        content(path, column="nobody")


def test_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows)
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "12:30.jsonl").write_text(jsonl)
    (tmp_path / "cut.jsonl").write_text(jsonl + '{"text": "the line en')
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "rows.csv").write_text("text\none\ntwo\n")
    (tmp_path / "rows.tsv").write_text("id\ttext\n1\tone\n2\ttwo\n")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as handle:
        handle.write(jsonl)
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(jsonl.encode()))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("plain.txt", "wiki.train.tokens", "README", "utf16.txt", "bom.txt", "windows.txt"):
        codec = {"utf16.txt": "utf-16", "bom.txt": "utf-8-sig"}.get(name, "utf-8")
        line_end = "\r\n" if name == "windows.txt" else "\n"
        (tmp_path / name).write_bytes(f"one{line_end}{line_end}two".encode(codec))
    for path in sorted(tmp_path.iterdir()):
        assert content(path) == "one\n\ntwo", path.name
    assert open_text(str(tmp_path / "cut.jsonl")).name == "cut.jsonl"


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("latin.txt", b"caf\xe9 au lait, and more", "not UTF-8"),
        ("picture.png", b"\x89PNG\0\0\0", "not"),
        ("empty.txt", b"", "empty"),
        ("empty.jsonl", b"", "no row with text"),
        ("nothing.jsonl", b'{"text": null}\n{"text": ""}\n', "no row with text"),
        ("broken.json", b"[1, 2", "not JSON"),
        ("broken.txt.gz", b"no gzip", "can't be read"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], "can't be read"),
        ("broken.parquet", b"PAR1", "can't be loaded"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=what) as refused:
        first_blocks(byte_tokenizer(), open_text(str(tmp_path / name)), block_size=4, blocks=1)
    assert name in refused.value.where and str(tmp_path) not in str(refused.value)


def test_a_half_of_an_emoji_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "half \\ud83d an emoji"}\n')
    assert content(tmp_path / "rows.jsonl") == "half \ufffd an emoji"


@pytest.mark.parametrize("spec", ["no/such/file.txt", "missing.jsonl", "https://example.org/x.txt"])
def test_texts_that_do_not_exist_are_refused_before_anything_is_fetched(spec: str) -> None:
    with pytest.raises(CalibrationError, match="no such text"):
        open_text(spec)


def test_a_mixture_has_its_shares(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 4000)
    texts = [open_text(str(tmp_path / f"{name}.txt")) for name in "ab"]
    tokenizer = byte_tokenizer()
    drawn = draw_blocks(tokenizer, texts, blocks=8, block_size=32, seed=1, weights=[3, 1])
    shown = [tokenizer.decode(block) for block in drawn.ids.tolist()]
    assert shown == [letter * 32 for letter in "aabaaaba"]  # any half has three of one and one of the other
    assert [(part["name"], part["blocks"], part["share"]) for part in drawn.as_json()["parts"]] == [
        ("a.txt", 6, 0.75),
        ("b.txt", 2, 0.25),
    ]
    assert calibration_text.share_blocks(7, ["a", "b", "c"], None) == [3, 2, 2]
    with pytest.raises(UsageError, match="one weight"):
        draw_blocks(tokenizer, texts, blocks=8, block_size=32, seed=1, weights=[1])
    with pytest.raises(CalibrationError, match="fewer blocks"):
        draw_blocks(tokenizer, texts, blocks=1, block_size=32, seed=1)


def test_the_texts_of_a_mixture_take_turns() -> None:
    """Every eighth of the blocks, as the last, which repairs hold out, has about the share of each text."""
    counts = [40, 8, 8, 8]
    texts = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[calibration_text.in_turn(counts)]
    for eighth in texts.split(8):
        found = eighth.bincount(minlength=4)
        assert (found - torch.tensor([5, 1, 1, 1])).abs().max() <= 1
    assert calibration_text.in_turn([5]).tolist() == [0, 1, 2, 3, 4]


def test_a_mixture_from_the_command_line(
    save_tiny: Callable[..., Path], tmp_path: Path, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama")
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text(license_text)
    lines(Path("two.jsonl"), [{"body": license_text}, {"body": None}])
    command = ["prune", "tiny", "--calibration", "one.txt", "--calibration", "two.jsonl", "--out", "cut"]
    sizes = ["--blocks", "4", "--block-size", "32", "--multiple-of", "8", "--repair", "none"]
    more = ["--calibration-weights", "3,1", "--text-column", "body"]
    result = CliRunner().invoke(main, [*command, *sizes, *more])
    assert result.exit_code == 0, result.output
    manifest = json.loads(Path("cut/surgeon.json").read_text())
    assert [part["blocks"] for part in manifest["calibration"]["parts"]] == [3, 1]
    assert "--calibration one.txt --calibration two.jsonl --calibration-weights 3,1" in manifest["command"]
    card = Path("cut/README.md").read_text()
    assert "3 blocks (75%) of one.txt" in card and "1 blocks (25%) of two.jsonl" in card
