"""Tokenizers in GGUF files: byte-level BPE, and SentencePiece's BPE as Llama 2 and Mistral have it.

    byte-level        tokens, merges, types and the name of the splitting rule, which must be one that llama.cpp has
    SentencePiece     tokens, scores and types

SentencePiece joins the neighbours whose union has the highest score until none is a piece, and its trainer gives the
k-th piece it makes the score -k. The tokenizers library holds the same order as a list of merges, so the score of a
piece is minus the place of the first merge that makes it; single characters are never made, and bytes stand in for
characters that are no pieces.

Source: the GGUF specification; Kudo and Richardson 2018, "SentencePiece".
"""

from __future__ import annotations

import json
import re
from typing import Any

from fuselora.engine.errors import expected

# What a byte-level tokenizer splits at (digits in threes, or one by one) -> llama.cpp's name of the rule.
_BEFORE_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {
    _BEFORE_DIGITS + r"\p{N}{1,3}" + _AFTER_DIGITS: "llama-bpe",
    _BEFORE_DIGITS + r"\p{N}" + _AFTER_DIGITS: "qwen2",
    "ByteLevel": "gpt-2",
}
SPACE = "\u2581"  # of SentencePiece
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NEVER_MADE = -1e6  # the score of single characters and added tokens


def check_tokenizer(tokenizer: Any) -> None:
    """Raise UserError unless it is of a kind that is written here."""
    if not is_sentencepiece(tokenizer):
        splitter(tokenizer)


def is_sentencepiece(tokenizer: Any) -> bool:
    """Whether it is SentencePiece's BPE: characters, bytes for unknown ones, and spaces as a visible mark."""
    state = _state(tokenizer)
    model = state.get("model", {})
    marks = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")], ensure_ascii=False)
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and SPACE in marks


def _state(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}


def splitter(tokenizer: Any) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits text before BPE."""
    state = _state(tokenizer)
    rule = state.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    pattern = next((s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"), None)
    last = steps[-1]
    plain = last.get("type") == "ByteLevel" and last.get("use_regex", True) and not last.get("add_prefix_space", False)
    key = pattern if pattern is not None else "ByteLevel" if plain else None
    if state.get("model", {}).get("type") != "BPE" or last.get("type") != "ByteLevel" or key not in SPLITTERS:
        raise expected(
            "export_gguf",
            "a byte-level BPE tokenizer with the splitting rule of Llama 3, Qwen2 or GPT-2, or SentencePiece's BPE",
            "another",
            "convert the exported folder with llama.cpp's script",
        )
    return SPLITTERS[key]


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Vocabulary, special tokens and chat template, for embeddings of ``rows`` rows."""
    state = _state(tokenizer)
    tokens, types = _tokens(state, tokenizer, rows)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["model"]["merges"]]
    if is_sentencepiece(tokenizer):
        made = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([made.get(token, NEVER_MADE) for token in tokens])
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter(tokenizer))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None and index < rows:  # AutoTokenizer adds names that a model may have no row for
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(adds_bos(tokenizer))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins every text with its first token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _tokens(state: dict[str, Any], tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """(texts, llama.cpp's types) by id."""
    from gguf import TokenType

    added = {entry["id"]: entry for entry in state["added_tokens"]}
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    pieces = is_sentencepiece(tokenizer)
    tokens, types = [], []
    for index in range(rows):  # embeddings may have more rows than the tokenizer has tokens
        word = words.get(index)
        tokens.append(f"[PAD{index}]" if word is None else word)
        if word is None:
            types.append(TokenType.UNUSED)
        elif pieces and word == tokenizer.unk_token:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        elif pieces and BYTE.fullmatch(word):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a text begins with a space that it does not have."""
    pre, normalizer = state.get("pre_tokenizer") or {}, state.get("normalizer") or {}
    if pre.get("type") == "Metaspace":
        return pre.get("prepend_scheme", "always") != "never"
    return any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))
