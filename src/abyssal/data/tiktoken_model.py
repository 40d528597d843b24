"""tiktoken.model: the vocabulary file of Moonshot's checkpoints (Moonlight, Kimi-K2), read into `tokenizers`.

Each line holds a token's bytes in base64 and its rank, which is its id. tiktoken joins whichever neighbours make the
token of the lowest rank; `tokenizers` wants the pairs themselves, so each token's pair is worked out here. The pattern
that cuts a text into words and the 256 special ids after the vocabulary stand in Moonshot's Python
(tokenization_moonshot.py, tokenization_kimi.py), which is not run.

That code also cuts runs of more than 25,000 blanks, or of as many non-blanks, before it looks for words. That was for
tiktoken's stack and is left out: ids may differ inside such runs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from abyssal.data.tokenizer import CHARACTER_OF
from abyssal.errors import UserError

# Chinese characters by themselves; words with what precedes them and an English ending; up to three digits;
# punctuation; line breaks; blanks. `&&` is an intersection of character classes, to tiktoken's engine and to
# Oniguruma alike; the two agree on the classes of every code point (tokenizers 0.23, tiktoken 0.14).
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SPECIAL_IDS = 256  # 163584 + 256 = 163840, the vocab_size of the models
# Moonlight's code counts two ids more, for which the model has no embedding: read where a file names them.
MOST_SPECIAL_IDS = SPECIAL_IDS + 2


def read_tiktoken(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a tiktoken.model, with the special tokens that `config` (its tokenizer_config.json) names
    in `added_tokens_decoder`; ids without a name are ``<|reserved_token_{id}|>``. Raises UserError for lines that
    are no token and rank, for ranks doubled or missing, and for special ids outside those after the vocabulary."""
    ranks = read_ranks(file)
    vocabulary = {_spelling(token): rank for token, rank in ranks.items()}
    merges = [(_spelling(pair[0]), _spelling(pair[1])) for token in ranks if (pair := last_pair(token, ranks))]
    # ignore_merges: a word that is a token is that token, even where no merges lead to it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = _special_tokens(len(ranks), config, file.with_name("tokenizer_config.json"))
    backend.add_tokens(special)  # each gets the next id
    for index, token in enumerate(special, len(ranks)):
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"{file.with_name('tokenizer_config.json')}: added_tokens_decoder gives id {index} to "
                f"{token.content!r}, which is already a token; expected each token once"
            )
    return backend


def read_ranks(file: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken.model and their ranks, in the order of the ranks. Raises UserError for a damaged
    file."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected a file with a token and its rank a line") from error
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError:
            shown = line[:40].decode(errors="replace")
            raise UserError(f"{file}: line {number} is {shown!r}; expected a token in base64 and its rank") from None
        if rank in tokens:
            raise UserError(f"{file}: line {number} gives rank {rank} for the second time; expected each rank once")
        tokens[rank] = token
    for rank in range(len(tokens)):
        if rank not in tokens:
            raise UserError(f"{file}: no token has rank {rank}; expected ranks 0 to {len(tokens) - 1} without a gap")
    ranks = {tokens[rank]: rank for rank in range(len(tokens))}
    if len(ranks) < len(tokens):
        twice = next(rank for rank, token in tokens.items() if ranks[token] != rank)
        raise UserError(f"{file}: {tokens[twice]!r} has ranks {twice} and {ranks[tokens[twice]]}; expected one")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"{file}: byte 0x{byte:02X} is no token; expected all 256 bytes in the vocabulary")
    return ranks


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that byte-pair encoding joins into `token`: what it leaves of the token's bytes when joining all
    of them is the one thing it may not do. None for a single byte and where more than two parts are left.

    No other pair is needed: whenever a longer text comes to join two neighbours into `token`, no join has crossed its
    ends, so its bytes have been joined one after the other as they are here, by themselves.
    """
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        joins = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        lowest = min(joins)
        if lowest == len(ranks):
            return None
        at = joins.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _special_tokens(first: int, config: Mapping[str, Any], config_file: Path) -> list[AddedToken]:
    """Those of the ids from `first` on, in order."""
    given = config.get("added_tokens_decoder", {})
    named: dict[int, AddedToken] = {}
    try:
        for index, token in given.items():
            special = bool(token.get("special", True))
            named[int(index)] = AddedToken(token["content"], special=special, normalized=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{config_file}: added_tokens_decoder is not readable ({type(error).__name__}: {error}); "
            "expected an object of id: {content, special}"
        ) from error
    last = first + MOST_SPECIAL_IDS - 1
    for index, token in named.items():
        if not first <= index <= last:
            raise UserError(
                f"{config_file}: added_tokens_decoder gives id {index} to {token.content!r}; "
                f"expected ids after the vocabulary, {first} to {last}"
            )
    end = max([first + SPECIAL_IDS, *(index + 1 for index in named)])
    return [
        named.get(index) or AddedToken(f"<|reserved_token_{index}|>", special=True, normalized=False)
        for index in range(first, end)
    ]


def _spelling(token: bytes) -> str:
    return "".join(map(CHARACTER_OF.__getitem__, token))
