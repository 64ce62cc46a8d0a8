"""Cut a tokenizer.json down to what some texts need of it, for tests; ids, merges and splitting stay.

    python -m tests.text.excerpt FULL.json OUT.json IDS.json KEY...

IDS.json is a recording of token ids (a list "prompts" of objects, KEY: ids). Kept are these tokens, the
merges that lead to them, all single bytes, and the special tokens. llama3_excerpt.json is of the vocabulary
in the package llama_models 0.3.0, clip_excerpt.json of openai/CLIP's file of merges.
"""

import json
import sys
from pathlib import Path


def merges_of(token: str, ranks: dict[tuple[str, str], int], suffix: str) -> list[tuple[str, str]]:
    """The merges that make a token out of its characters, by rank as BPE applies them."""
    body = token.removesuffix(suffix) if suffix else token
    parts, used = list(body), []
    if parts and suffix and token.endswith(suffix):
        parts[-1] += suffix
    while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        i = next(i for i in range(len(parts)) if (parts[i], parts[i + 1]) == best)
        parts[i : i + 2] = [best[0] + best[1]]
        used.append(best)
    return used


def excerpt(full: dict, ids: set[int]) -> dict:
    """full: a tokenizer.json of byte-level BPE · ids: tokens to keep"""
    model, suffix = full["model"], full["model"].get("end_of_word_suffix") or ""
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    names = {number: token for token, number in model["vocab"].items()}
    used = {pair for i in ids if i in names for pair in merges_of(names[i], ranks, suffix)}
    special = {token["content"]: token["id"] for token in full["added_tokens"]}
    kept = {names[i] for i in ids if i in names} | {part for pair in used for part in (*pair, "".join(pair))}
    kept |= {token for token in model["vocab"] if len(token.removesuffix(suffix)) == 1}
    vocab = {token: number for token, number in model["vocab"].items() if token in kept}
    vocab |= special  # those that are only beside the vocabulary would get the next free ids
    merges = [list(pair) for pair in sorted(used, key=ranks.__getitem__)]
    return full | {"model": model | {"vocab": vocab, "merges": merges}}


def renumbered(rules: dict) -> dict:
    """The same tokenizer with ids from 0 on, in their old order, for models of a small vocabulary."""
    old = rules["model"]["vocab"]
    new = {token: number for number, token in enumerate(sorted(old, key=old.__getitem__))}
    tokens = [token | {"id": new[token["content"]]} for token in rules["added_tokens"]]
    return rules | {"added_tokens": tokens, "model": rules["model"] | {"vocab": new}}


def main(full: str, out: str, recording: str, *keys: str) -> None:
    prompts = json.loads(Path(recording).read_text(encoding="utf-8"))["prompts"]
    ids = {number for prompt in prompts for key in keys for number in prompt[key]}
    rules = excerpt(json.loads(Path(full).read_text(encoding="utf-8")), ids)
    Path(out).write_text(json.dumps(rules, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
