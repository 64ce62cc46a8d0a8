"""Text to token ids, as the text encoders were trained to read them."""

from pathlib import Path

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
