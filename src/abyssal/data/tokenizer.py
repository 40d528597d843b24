"""Byte-level BPE: text to token ids and back, exactly.

Every DeepSeek generation uses byte-level BPE: the vocabulary holds all 256 bytes, so any text has an encoding and
decoding gives it back byte for byte. `Tokenizer` wraps the `tokenizers` library, which does the encoding. Decoding is
done here, over the bytes of each token, because a token may end in the middle of a UTF-8 character and a stream must
not show half of one.

Special tokens and plain text. `encode` adds none and finds none: where a corpus happens to contain the spelling
``<｜end▁of▁sentence｜>``, those characters are encoded as ordinary text, never as the id that ends a document. Only the
caller puts `bos_id` and `eos_id`, as ids. (Added tokens that a published file does not mark as special, such as
DeepSeek-V3's ``<think>``, are found in text, as their authors meant. transformers finds the special ones too, unless
told ``split_special_tokens=True``.)

Conversations are the exception. A chat template writes special tokens by their spelling, so `encode_chat` finds them,
BOS included, in all of the rendered text, as transformers' `apply_chat_template` does. What a user types is part of
that text: a service that must not let users end a turn has to look for `end_of_turn_ids` in what they typed.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from abyssal.data.chat import TEMPLATE_FILE, ChatTemplate, default_template, read_object, read_template, special_tokens
from abyssal.errors import UserError

BOS = "<｜begin▁of▁sentence｜>"  # id 0 and 1 in DeepSeek-V3, and in every tokenizer trained here
EOS = "<｜end▁of▁sentence｜>"
SMALLEST_VOCABULARY = 256 + 2
TIKTOKEN_FILE = "tiktoken.model"

# For a tokenizer.json with no tokenizer_config.json beside it; the first that is an added token counts.
USUAL_BOS = (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
USUAL_EOS = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")


class Tokenizer:
    """A byte-level tokenizer with its BOS and EOS.

    `vocab_size` is the highest id plus one, added tokens included: a model's vocab_size must be at least that.
    `bos_id` and `eos_id` are None where the tokenizer has no such token. `adds_bos`: whether the model expects BOS
    before plain text (`encode` adds none either way); yes wherever there is a BOS, unless the config's
    `add_bos_token` is false. `chat` is None without a template. `config` is what tokenizer_config.json says beside
    all that; `save` writes it again.

    `backend` is changed: its padding and truncation are switched off, and special tokens spelt in a text are no
    longer found. Raises UserError for a tokenizer that is not byte-level or does not hold `bos` or `eos`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos: str | None = None,
        eos: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> None:
        spec = json.loads(backend.to_str())
        if not _is_byte_level(spec["decoder"]):
            kind = spec["decoder"]["type"] if spec["decoder"] else None
            raise UserError(f"the tokenizer's decoder is {kind}; abyssal reads byte-level tokenizers (ByteLevel)")
        added = backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        for token in (bos, eos):
            if token is not None and backend.token_to_id(token) is None:
                raise UserError(f"the vocabulary of {backend.get_vocab_size()} tokens has no {token!r}")
            if token is not None and token not in special:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])

        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.bos, self.eos = bos, eos
        self.bos_id: int | None = None if bos is None else backend.token_to_id(bos)
        self.eos_id: int | None = None if eos is None else backend.token_to_id(eos)
        self.end_ids: frozenset[int] = frozenset()  # further ends of text, that the checkpoint lists elsewhere
        self.config: dict[str, Any] = dict(config or {})
        self.adds_bos: bool = bos is not None and self.config.get("add_bos_token") is not False
        self.chat: ChatTemplate | None = None
        if template is not None:
            self.chat = ChatTemplate(template, self._named())

        added = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._added = frozenset(added)
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._bytes = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            self._bytes[index] = token.encode() if index in added else _bytes_of(token)
        self._can_cut = _can_cut(spec)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no special token added or found in it. Raises UserError for text that has no
        UTF-8 form (a lone surrogate)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, spread over the processor's cores."""
        return _encode(self.backend, texts)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as the chat template writes it; `options` and what is raised as in `ChatTemplate.render`.
        Raises UserError where there is no template."""
        if self.chat is None:
            raise UserError(
                "this tokenizer has no chat template; expected chat_template.jinja beside its tokenizer.json, or "
                "chat_template in its tokenizer_config.json"
            )
        return self.chat.render(messages, **options)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        """The ids of the rendered conversation, ready for the assistant's next turn: special tokens spelt in it are
        those tokens, and no BOS is added to what the template wrote. Raises UserError as `render_chat` does."""
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt=add_generation_prompt, **options))

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of what :meth:`render_chat` gave: special tokens spelt in it are those tokens."""
        return self.encode_rendered_batch([text])[0]

    def encode_rendered_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_rendered` of each text, spread over the processor's cores."""
        return _encode(self._finding_special, texts)

    def with_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        changed = copy.copy(self)
        changed.__dict__.pop("end_of_turn_ids", None)  # worked out from the template
        changed.chat = ChatTemplate(template, self._named())
        return changed

    def _named(self) -> dict[str, str]:
        """The special tokens that a template may name."""
        ends = {"bos_token": self.bos, "eos_token": self.eos}
        return special_tokens(self.config) | {name: token for name, token in ends.items() if token is not None}

    @cached_property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The id that the chat template puts after an assistant's message (DeepSeek-V3: EOS; Moonlight:
        ``<|im_end|>``). Empty without a template, and where the template marks no end or refuses a plain exchange."""
        if self.chat is None:
            return frozenset()
        answer = "the-assistant's-answer"
        try:
            text = self.chat.render([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}])
        except UserError:
            return frozenset()
        _, found, after = text.rpartition(answer)
        ids = _encode(self._finding_special, [after])[0] if found else []
        return frozenset([index for index in ids if index in self._added][:1])

    @cached_property
    def _finding_special(self) -> tokenizers.Tokenizer:
        """The same backend as transformers has it: special tokens spelt in a text are found."""
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = False
        return backend

    def pieces(self, text: str, size: int = 2**16) -> Iterator[str]:
        """Cut a long text into pieces of about `size` characters whose ids, one after the other, are the ids of the
        whole. A novel then takes little memory and all cores. A tokenizer for which no such cut is known to be safe
        gives the text whole."""
        start = 0
        while self._can_cut and (cut := _SAFE_CUT.search(text, start + size)):
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps not whole UTF-8 characters; of a special token, its spelling.
        Raises UserError for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(
                f"token id {token_id} is outside the tokenizer's vocabulary of {self.vocab_size} tokens "
                f"(0 to {self.vocab_size - 1})"
            )
        return self._bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out (BOS, EOS, and what the tokenizer marks as special)."""
        return token_id in self._special

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, exactly as it was encoded. Bytes that are no UTF-8 become U+FFFD. Raises UserError for
        an id outside the vocabulary."""
        kept = (i for i in map(int, ids) if not (skip_special and i in self._special))
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hex of what decides the ids: the tokenizer's JSON with sorted keys, BOS and EOS. Whether BOS goes
        before plain text (`save` notes it in the JSON) is no part of it, and neither is the chat template."""
        tokenizer = json.loads(self.backend.to_str())
        tokenizer["post_processor"] = self._without_bos(tokenizer["post_processor"])
        spec = {"tokenizer": tokenizer, "bos_id": self.bos_id, "eos_id": self.eos_id}
        canonical = json.dumps(spec, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where the config does not hold it, chat_template.jinja, as
        transformers' AutoTokenizer reads them: the same ids and chats, and BOS before plain text if `adds_bos`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        # The tokens by name as strings: transformers does not read every form of object that published configs hold.
        config = defaults | self.config | special_tokens(self.config) | {"add_bos_token": self.adds_bos}
        text = self.backend.to_str(pretty=True)
        if self.adds_bos and self.backend.encode("").ids[:1] != [self.bos_id]:
            # transformers 5 does not look at add_bos_token where there is a tokenizer.json: its post-processor decides.
            tokenizer = json.loads(text)
            tokenizer["post_processor"] = self._with_bos(tokenizer["post_processor"])
            text = json.dumps(tokenizer, indent=2, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.chat is None or self.chat.source == default_template(config, folder):
            (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # another tokenizer's, which would win over this one's
        else:
            (folder / TEMPLATE_FILE).write_text(self.chat.source, encoding="utf-8")

    def _with_bos(self, post_processor: dict[str, Any] | None) -> dict[str, Any]:
        template = _bos_template(self.bos, self.bos_id)
        return {"type": "Sequence", "processors": [post_processor, template]} if post_processor else template

    def _without_bos(self, post_processor: dict[str, Any] | None) -> dict[str, Any] | None:
        """Undoes `_with_bos`, and leaves what others wrote."""
        template = _bos_template(self.bos, self.bos_id)
        if post_processor == template:
            return None
        several = post_processor["processors"] if post_processor and post_processor["type"] == "Sequence" else []
        return several[0] if len(several) == 2 and several[1] == template else post_processor

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder that holds tokenizer.json or Moonshot's tiktoken.model, or such a file itself. BOS and EOS
        are those of the tokenizer_config.json beside it; one it does not mention is looked for under its usual
        spellings. The chat template is chat_template.jinja's, else the config's. Moonshot's tokenizers put no BOS
        before plain text unless the config says so. Raises UserError where a file is missing or damaged."""
        path = Path(path)
        names = [path / "tokenizer.json", path / TIKTOKEN_FILE] if path.is_dir() else [path]
        file = next((name for name in names if name.is_file()), names[0])
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected a tokenizer.json or tiktoken.model, or its folder")
        config_file = file.with_name("tokenizer_config.json")
        config = read_object(config_file) if config_file.is_file() else {}
        template = read_template(file.parent, config)
        if file.name == TIKTOKEN_FILE:
            from abyssal.data.tiktoken_model import read_tiktoken  # here, as it needs this module's alphabet

            backend = read_tiktoken(file, config)
        else:
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises a bare Exception
                raise UserError(f"{file}: not a tokenizer.json: {' '.join(str(error).split())}") from error
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        ends = []
        for key, usual in (("bos_token", USUAL_BOS), ("eos_token", USUAL_EOS)):
            token = config[key] if key in config else next((name for name in usual if name in added), None)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise UserError(f"{config_file}: {key} is {token!r}; expected a string, an object with content or null")
            ends.append(token)
        if file.name == TIKTOKEN_FILE:
            config["add_bos_token"] = bool(config.get("add_bos_token"))
        if file.name == TIKTOKEN_FILE or "auto_map" in config:  # the class is Python that is not run here, nor saved
            config = {key: value for key, value in config.items() if key not in ("auto_map", "tokenizer_class")}
        try:
            return cls(backend, *ends, config=config, template=template)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


class StreamDecoder:
    """Decodes one token at a time and never shows half a UTF-8 character: bytes of an unfinished one wait for the
    next token. All that `push` and `flush` return, joined, equals `Tokenizer.decode` of all the ids, but that special
    tokens in `shown` are text in any case."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps empty. Raises UserError as `Tokenizer.decode` does."""
        if self._skip_special and self._tokenizer.is_special(token_id) and token_id not in self._shown:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The end: U+FFFD if a character was left unfinished, else nothing. The decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary from `texts`: BOS is 0, EOS is 1, then the 256 bytes, then the merges, the
    most frequent first. The same texts give the same ids.

    Where the texts have too few different pairs for `vocab_size`, the tokenizer has fewer tokens: read its own
    `vocab_size`, and give the model that or more. Raises UserError for a vocab_size below 258.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size is {vocab_size}; byte-level BPE needs at least 258 (256 bytes, BOS and EOS)")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, BOS, EOS)


def byte_tokenizer() -> Tokenizer:
    """A token a byte and no merges: BOS is 0, EOS is 1, byte b is 2 + b."""
    vocabulary = {BOS: 0, EOS: 1} | {CHARACTER_OF[byte]: 2 + byte for byte in range(256)}
    return Tokenizer(_byte_level(models.BPE(vocab=vocabulary, merges=[])), BOS, EOS)


def check_unicode(text: str) -> None:
    """Raise UserError for text with a lone surrogate, which has no UTF-8 form and so no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "expected text that has a UTF-8 form"
        ) from error


def _encode(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except TypeError:
        for text in texts:
            check_unicode(text)
        raise


def _bos_template(bos: str | None, bos_id: int | None) -> dict[str, Any]:
    """The post-processor that puts BOS before a text, as `tokenizers` writes it. The single BOS before a pair tells it
    from those that published files hold, which put one before each text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: visible Latin-1 characters stand for themselves, the others, in
    order, for U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


CHARACTER_OF = _byte_alphabet()
_BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}

# In GPT-2's pattern no match runs from a character that is not a blank into one that is, none looks back, and the one
# look-ahead asks whether a run of blanks ends, which a piece ending in a non-blank answers as the whole text does.
# (A cut after a newline would be wrong: it may split a run of blanks that the pattern takes as one.)
_SAFE_CUT = re.compile(r"\S(?=[ \n])")


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # a whole character that stands for itself, as in vocabularies that list a special token
        return token.encode()


def _can_cut(spec: dict[str, Any]) -> bool:
    """Whether `_SAFE_CUT` holds: GPT-2's pattern, nothing before it, and no added token that is found in text."""
    pattern = spec["pre_tokenizer"] or {}
    return (
        spec["normalizer"] is None
        and pattern.get("type") == "ByteLevel"
        and pattern.get("use_regex") is True
        and pattern.get("add_prefix_space") is False
        and all(token["special"] for token in spec["added_tokens"])
    )


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", [])))
