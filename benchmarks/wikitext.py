"""WikiText's words put together again: ``python benchmarks/wikitext.py wikitext2_test.txt.gz out.txt``.

WikiText has blanks around punctuation, ``@-@`` for a hyphen within a word and headings as `` = Title = ``; a model that
reads ordinary text finds that harder than it is. The rules are those that Megatron-LM and lm-evaluation-harness
measure WikiText with, in their order; ``<unk>`` stays.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from abyssal.data.corpus import documents

RULES: list[tuple[str, str]] = [
    (r"s '", "s'"),
    (r" @([-,.])@ ", r"\1"),
    *((rf" ([{mark}]) ", r"\1 ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
]


def detokenised(text: str) -> str:
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text


if __name__ == "__main__":
    text = "\n\n".join(documents(sys.argv[1]))
    Path(sys.argv[2]).write_text(detokenised(text), encoding="utf-8")
