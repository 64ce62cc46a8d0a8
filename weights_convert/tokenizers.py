"""Tokenizer files of a release: which there are, and a tokenizer.json where only its parts were saved."""

import json
from pathlib import Path

from weights_convert.checkpoint import find_files, read_json

Tokenizers = dict[str, tuple[str, Path]]  # component -> (class, file)

START_OF_LLAMA, START_OF_CLIP = "<|begin_of_text|>", "<|startoftext|>"

# How CLIP splits a text into words (openai/CLIP clip/simple_tokenizer.py), in the words of a tokenizer.json.
CLIP_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
CLIP_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


def find_tokenizers(source: Path, scratch: Path) -> Tokenizers:
    """The tokenizers of SOURCE. Files that have to be made are made in scratch."""
    found: Tokenizers = {}
    for path in find_files(source, ("spiece.model",)):
        add(found, "tokenizer", "SentencePiece", path)
    for path in find_files(source, ("tokenizer.json",)):
        rules = read_json(path)
        names = {token.get("content") for token in rules.get("added_tokens", ())}
        names |= set(rules.get("model", {}).get("vocab", ()))
        if START_OF_LLAMA in names:
            add(found, "tokenizer", "LlamaTokenizer", path)
        elif START_OF_CLIP in names:
            add(found, "tokenizer_2", "CLIPTokenizer", path)
    for path in find_files(source, ("vocab.json",)):
        merges = path.with_name("merges.txt")
        if "tokenizer_2" not in found and merges.is_file() and START_OF_CLIP in (vocab := read_json(path)):
            made = scratch / "tokenizer.json"
            made.write_text(json.dumps(clip_rules(vocab, merges.read_text(encoding="utf-8"))))
            add(found, "tokenizer_2", "CLIPTokenizer", made)
    return found


def add(found: Tokenizers, component: str, class_name: str, path: Path) -> None:
    """Remember a tokenizer; a second, different one of a kind is an error."""
    other = found.setdefault(component, (class_name, path))
    if other[0] != class_name or other[1].read_bytes() != path.read_bytes():
        raise ValueError(f"{other[1]} and {path} are different tokenizers; move one of them away")


def clip_rules(vocab: dict[str, int], merges: str) -> dict:
    """A tokenizer.json of CLIP from its vocab.json and merges.txt."""
    special = lambda token: {
        "id": vocab[token], "content": token, "special": True, "normalized": False, "single_word": False,
        "lstrip": False, "rstrip": False,
    }  # fmt: skip
    pairs = [line for line in merges.splitlines() if line.strip() and not line.startswith("#version")]
    return {
        "version": "1.0",
        "added_tokens": [special(START_OF_CLIP), special("<|endoftext|>")],
        "normalizer": CLIP_NORMALIZER,
        "pre_tokenizer": CLIP_SPLIT,
        "model": {
            "type": "BPE", "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "vocab": vocab, "merges": pairs,
        },
    }  # fmt: skip
