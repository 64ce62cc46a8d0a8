from pathlib import Path

import pytest

import minidit.text.tokenizers
from minidit.presets import WAN_NEGATIVE_PROMPT
from minidit.text.prompts import clean_prompt
from minidit.text.tokenizers import END, SentencePiece

MODEL = Path(minidit.text.tokenizers.__file__).parents[1] / "demo" / "tokenizer" / "spiece.model"

TEXTS = [
    "",
    "a red circle moves left",  # "left to right" is one piece here, and several in transformers
    "A RED Circle",
    "  two   cats\n\tboxing ",
    "a  b   c",
    "hello, world!",
    "it’s “quoted” — dash…",
    "色调艳丽，过曝　静态",
    WAN_NEGATIVE_PROMPT,
    "ＦＵＬＬ width １２３",
    "zero\u200bwidth",
    "join\u200der, line\u2028separator",
    "soft\u00adhyphen",
    "\ufeffbyte order mark",
    "no-break\u00a0space",
    "a\x00b",
    "🙂🙂 two unknowns 🙂 and one",
    "naïve café façade",
    "e\u0301 combining",
    "&lt;b&gt;bold&lt;/b&gt;",
    "x" * 50,
    "3.14159 + 2 = 5",
    "½ ² ™ ①",
    "ﬁne ligature",
    "▁under▁score",
    "a ▁ b",
    "▁",
    "Привет мир",
    "नमस्ते दुनिया",
    "日本語のテキスト",
    "مرحبا بالعالم",
    "the blue square is on the green background, moving upward.",
]


@pytest.fixture(scope="module")
def transformers_tokenizer():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")  # with it transformers reads spiece.model
    return transformers.T5Tokenizer.from_pretrained(MODEL.parent)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_equal_those_of_transformers(text, transformers_tokenizer):
    text = clean_prompt(text)
    for max_len in (512, 5):
        wanted = transformers_tokenizer(text, truncation=True, max_length=max_len).input_ids
        assert SentencePiece(MODEL).encode(text, max_len) == wanted


@pytest.mark.parametrize("name", ["</s>", "<pad>", "<unk>"])
def test_token_names_are_spelled_out_where_transformers_reads_tokens(name, transformers_tokenizer):
    tokenizer = SentencePiece(MODEL)
    ours = tokenizer.encode(name, 512)
    assert len(ours) > 3 and ours.count(END) == 1
    assert transformers_tokenizer(name).input_ids == [tokenizer.pieces.piece_to_id(name), END]


def test_end_token_closes_every_text():
    tokenizer = SentencePiece(str(MODEL))
    red, long = tokenizer.encode("a red circle", 512), tokenizer.encode("red " * 900, 512)
    assert red[-1] == END and red.count(END) == 1
    assert [tokenizer.pieces.id_to_piece(i) for i in red[:-1]] == ["▁a", "▁red", "▁circle"]
    assert len(long) == 512 and long[-1] == END and long.count(END) == 1
    assert tokenizer.encode("", 512) == tokenizer.encode("a red circle", 1) == [END]


def test_every_id_is_below_vocab():
    tokenizer = SentencePiece(MODEL)
    assert all(0 <= i < tokenizer.vocab for text in TEXTS for i in tokenizer.encode(text, 512))
    assert tokenizer.pieces.id_to_piece(tokenizer.vocab - 1)


def test_no_room_for_the_end_token_is_refused():
    with pytest.raises(ValueError, match="max_len=0 leaves no room"):
        SentencePiece(MODEL).encode("a red circle", 0)


def test_missing_model_is_named(tmp_path):
    for path in (tmp_path / "spiece.model", tmp_path):  # a folder is no file either
        with pytest.raises(OSError, match=r"^no tokenizer at .*; wanted the model's spiece.model$"):
            SentencePiece(path)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs", MODEL.name], ids=["empty", "pointer", "cut"]
)
def test_broken_model_is_named(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(MODEL.read_bytes()[:5000] if content == MODEL.name else content)
    with pytest.raises(OSError, match=r"^.*spiece.model \(\d+ bytes\) is not a sentencepiece model; .*$"):
        SentencePiece(path)


def test_model_of_another_family_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(  # its own ids by default: 1 is <s>
        sentence_iterator=iter(["a red circle", "a blue square"] * 20),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"has '<s>' where T5 models have </s> \(id 1\)"):
        SentencePiece(tmp_path / "llama.model")
