"""The caption tokenizer: CLIP's byte-pair encoding, with merges that make every word of a world one token."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

LENGTH = 32
"""Tokens per caption, including start and end."""

START, END = "<|startoftext|>", "<|endoftext|>"
STOP = "</w>"
"""Suffix of a word's last symbol."""


def byte_symbols() -> list[str]:
    """Printable characters that stand for the 256 bytes (GPT-2's table, used by CLIP), in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def merge(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Split a word into symbols: the pair of lowest rank is merged first, until no known pair is left."""
    symbols = [*word[:-1], word[-1] + STOP]
    while len(symbols) > 1:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token.

    Each word adds the merges it still lacks after all earlier ones, which take precedence in encoding, so a later merge
    never breaks an earlier word.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = merge(word, ranks)
        while len(symbols) > 1:
            ranks.setdefault((symbols[0], symbols[1]), len(ranks))
            symbols[:2] = [symbols[0] + symbols[1]]
    return list(ranks)


def write_tokenizer(folder: Path, words: Sequence[str]) -> CLIPTokenizer:
    """Write `vocab.json`, `merges.txt` and the tokenizer's own files to `folder`; returns the tokenizer.

    words: one token each. The end token has the highest id: open_clip finds it by `argmax`.
    """
    merges = merges_for(list(words))
    symbols = sorted(byte_symbols())
    entries = [*symbols, *(s + STOP for s in symbols), *dict.fromkeys(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: place for place, entry in enumerate(entries)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer
