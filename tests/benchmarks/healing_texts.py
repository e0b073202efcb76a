"""The texts that docs/results.md heals on: four kinds of text, and more encyclopaedia.

    python tests/benchmarks/healing_texts.py FOLDER

Writes wiki.txt, c4.txt, code.txt and technical.txt from the wheel `exllamav2`, each without its last part,
which is KIND-held-out.txt. encyclopaedia.txt is wiki.txt and the same part of 93 articles of the English
Wikipedia, which the test data of the wheel `gensim` carries as wikitext (CC BY-SA); their templates, tables,
lists and references are removed.
"""

from __future__ import annotations

import bz2
import html
import re
import sys
import tempfile
from pathlib import Path

from calibration_texts import KINDS, TEXT_WHEEL, from_wheel, without_end

HELD_OUT = 0.15  # of each text, at its end
ARTICLES = (
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
LEAST = 1500  # characters of an article that is kept
ENDS = ("See also", "References", "External links", "Notes", "Further reading")
PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
WHOLE = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>"
    r"|<(math|gallery|table|timeline|blockquote|div|pre|code|source)[^>]*>.*?</\1>",
    re.S,
)
NESTED = ((re.compile(r"\{\{[^{}]*\}\}"), 6), (re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S), 4))
LINKS = (
    (r"\[\[(?:File|Image|Category)[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", ""),
    (r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1"),
    (r"\[https?://\S+ ?([^\]]*)\]", r"\1"),
    (r"'{2,}|<[^>]+>", ""),
    (r"&nbsp;", " "),
)


def plain(wikitext: str) -> str:
    """The headings and paragraphs of an article before its first section of references."""
    text = WHOLE.sub("", html.unescape(wikitext))
    for pattern, depth in NESTED:
        for _ in range(depth):
            text = pattern.sub("", text)
    for pattern, kept in LINKS:
        text = re.sub(pattern, kept, text)
    lines: list[str] = []
    for line in map(str.strip, text.split("\n")):
        if line.startswith("=="):
            lines.append(line.strip("= "))
        elif line and line[0] not in "*#:;|!{}=":
            lines.append(line)
    end = next((place for place, line in enumerate(lines) if line in ENDS), len(lines))
    return "\n".join(lines[:end])


def articles(folder: Path) -> str:
    """All articles, each under its title."""
    pages = PAGE.findall(bz2.decompress(from_wheel(*ARTICLES, folder).read_bytes()).decode())
    found = [
        f"{title}\n\n{text}"
        for title, wikitext in pages
        if not wikitext.lower().startswith("#redirect") and ":" not in title
        if len(text := plain(wikitext)) > LEAST
    ]
    return "\n\n".join(found)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as kinds, tempfile.TemporaryDirectory() as more:
        source = from_wheel(TEXT_WHEEL[0], TEXT_WHEEL[1] + "wiki.utf8", Path(kinds)).parent
        for kind in KINDS.values():
            text, end = without_end((source / f"{kind}.utf8").read_text(encoding="utf-8"), HELD_OUT)
            (folder / f"{kind}.txt").write_text(text, encoding="utf-8")
            (folder / f"{kind}-held-out.txt").write_text(end, encoding="utf-8")
        own = (folder / "wiki.txt").read_text(encoding="utf-8")
        both = f"{own}\n\n{without_end(articles(Path(more)), HELD_OUT)[0]}"
        (folder / "encyclopaedia.txt").write_text(both, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
