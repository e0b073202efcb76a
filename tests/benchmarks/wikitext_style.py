"""Writes Wikipedia articles the way WikiText's splits have them, as a stand-in for its training split.

    pip install sacremoses==0.2.0
    python tests/benchmarks/wikitext_style.py FOLDER

FOLDER holds encyclopaedia.txt of `healing_texts.py`; wikitext-style.txt is written beside it. Articles of at
least LEAST characters are tokenised by Moses' rules, with " @-@ ", " @,@ " and " @.@ " inside words and
numbers and " = Title = " for headings, as WikiText is (Merity et al. 2016, section 4.3). Articles that share
SHARED words in a row with the test split are left out, and counted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
from sacremoses import MosesTokenizer

LEAST = 1500  # characters of an article that is kept
SHARED = 10  # words in a row
TEST = Path("data/wikitext-2-raw-v1/test-00000-of-00001.parquet")
ARTICLE = re.compile(r"<doc [^>]*>\n(.*?)</doc>", re.S)
NUMBER = re.compile(r"(?<=\d)([,.])(?=\d)")
HEADING = re.compile(r"[A-Z][^.!?:;]{1,60}\.?")


def articles(text: str) -> Iterator[list[str]]:
    """The lines of every article, its title first: those in <doc> tags, then those after a blank line."""
    for body in ARTICLE.findall(text):
        yield [line for line in body.split("\n") if line.strip()]
    rest = text.rpartition("</doc>")[2]
    for body in re.split(r"\n\n(?=[^\n]{1,80}\n\n)", rest):
        yield [line for line in body.split("\n") if line.strip()]


def rows(lines: list[str], tokenizer: MosesTokenizer) -> Iterator[str]:
    """The rows of an article as WikiText has them."""
    for place, line in enumerate(lines):
        text = NUMBER.sub(r" @\1@ ", tokenizer.tokenize(line, True, return_str=True, escape=False))
        if place == 0:
            yield from ("", f" = {text} = \n", "")
        elif HEADING.fullmatch(line):
            yield from ("", f" = = {text.removesuffix('.').strip()} = = \n", "")
        else:
            yield f" {text} \n"


def runs(text: str) -> set[tuple[str, ...]]:
    """All SHARED words in a row of a text, punctuation and case aside."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[start : start + SHARED]) for start in range(len(words) - SHARED + 1)}


def main(folder: Path) -> None:
    """Write wikitext-style.txt."""
    test = runs("\n".join(pyarrow.parquet.read_table(TEST)["text"].to_pylist()))
    tokenizer = MosesTokenizer("en")
    kept: list[str] = []
    found = left_out = 0
    for lines in articles((folder / "encyclopaedia.txt").read_text(encoding="utf-8")):
        if sum(map(len, lines)) < LEAST:
            continue
        if runs("\n".join(lines)) & test:
            left_out += 1
            continue
        found += 1
        kept += rows(lines, tokenizer)
    text = "\n\n".join(kept)
    (folder / "wikitext-style.txt").write_text(text, encoding="utf-8")
    print(f"{found} articles, {len(text):,} characters; {left_out} left out, with words of the test split")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
