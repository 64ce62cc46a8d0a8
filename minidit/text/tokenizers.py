"""Text to token ids, as the text encoders were trained to read them."""

from pathlib import Path
from typing import Any

PAD, END = 0, 1  # </s> closes every prompt; T5-family vocabularies agree on both


class SentencePiece:
    """The tokenizer of the T5 family: sentencepiece pieces and an end token; no start token, no template.

    A departure: words like "</s>" or "<pad>" in a prompt are spelled out like any others. The release reads
    them as the tokens of that name, as its tokenizer is that of transformers. All else gives equal ids.
    """

    def __init__(self, path: str | Path):
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        if not path.is_file():
            raise OSError(f"no tokenizer at {path}; wanted the model's spiece.model")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            size = path.stat().st_size
            raise OSError(
                f"{path} ({size} bytes) is not a sentencepiece model; copy spiece.model again"
            ) from error
        if (end := self.pieces.id_to_piece(END)) != "</s>":
            raise ValueError(
                f"{path} has {end!r} where T5 models have </s> (id {END}); take the encoder's own file"
            )

    @property
    def vocab(self) -> int:
        """How many ids there are; an encoder's embedding may have more rows (umt5-xxl: 256384), not fewer."""
        return self.pieces.vocab_size()

    def encode(self, text: str, max_len: int) -> list[int]:
        """Ids of the text and the end token, at most max_len of them; a longer text loses its last pieces."""
        if max_len < 1:
            raise ValueError(f"max_len={max_len} leaves no room for the end token; give at least 1")
        return self.pieces.encode(text)[: max_len - 1] + [END]


# Read from a tokenizer.json, through the library of that name


class LlamaTokenizer:
    """The tokenizer of Llama 3: a start token, then the text, in which names of special tokens are these."""

    def __init__(self, path: str | Path):
        self.rules = open_rules(path)
        self.start = token_id(self.rules, "<|begin_of_text|>", path)

    def encode(self, text: str, max_len: int) -> list[int]:
        """Ids of the start token and the text, at most max_len of them; a longer text loses its end."""
        check_room(max_len, 1)
        return [self.start, *self.rules.encode(text, add_special_tokens=False).ids][:max_len]


class CLIPTokenizer:
    """The tokenizer of CLIP: the text in lower case between a start and an end token."""

    def __init__(self, path: str | Path):
        self.rules = open_rules(path)
        self.start = token_id(self.rules, "<|startoftext|>", path)
        self.end = token_id(self.rules, "<|endoftext|>", path)

    def encode(self, text: str, max_len: int) -> list[int]:
        """Ids of the start token, the text and the end token, at most max_len; a longer text is cut."""
        check_room(max_len, 2)
        return [self.start, *self.rules.encode(text, add_special_tokens=False).ids[: max_len - 2], self.end]


def open_rules(path: str | Path) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json; its own padding and cutting are turned off."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise OSError(
            "this model's tokenizer needs the library tokenizers: pip install 'minidit[hunyuan]'"
        ) from None
    if not Path(path).is_file():
        raise OSError(f"no tokenizer at {path}; wanted the model's tokenizer.json")
    try:
        rules = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise OSError(f"{path} is not a tokenizer.json ({error}); copy it again") from error
    rules.no_padding()
    rules.no_truncation()
    return rules


def token_id(rules: Any, token: str, path: str | Path) -> int:
    """The id of a special token that the model cannot do without."""
    if (number := rules.token_to_id(token)) is None:
        raise ValueError(f"{path} has no {token}; take the text encoder's own tokenizer.json")
    return number


def check_room(max_len: int, least: int) -> None:
    if max_len < least:
        raise ValueError(f"max_len={max_len} leaves no room for start and end; give at least {least}")
