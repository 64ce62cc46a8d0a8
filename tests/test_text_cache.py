"""Prompts that were encoded before: the same bits, without the encoder."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidit.__main__ import main
from minidit.generate import Engine
from minidit.settings import Choices
from minidit.text import states
from minidit.text.states import TextCache, default_folder
from minidit.video import read_settings, read_video
from tests.test_generate_hunyuan_video import folder as hunyuan_folder  # noqa: F401 (a fixture)

PROMPT = "a red circle moves left to right"
SMALL = ["--size", "32x32", "--num-frames", "5", "--steps", "2", "--device", "cpu", "--quiet"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "texts"


def engine(folder: Path | None, **options) -> Engine:
    return Engine("demo", device="cpu", dtype="fp32", text_cache=folder, **options)


def texts(engine: Engine, *prompts: str, **choices) -> list[list[torch.Tensor]]:
    return engine.encode_all([engine.resolve(prompt, Choices(**choices)) for prompt in prompts])


def assert_equal(one: list, other: list) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture
def no_encoder(monkeypatch):
    """Loading a text encoder is an error."""
    module = Engine.module

    def refuse(self, component):
        assert not component.startswith("text_encoder"), "the text encoder was loaded"
        return module(self, component)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "module", refuse)
        yield


def test_what_is_found_has_the_same_bits(folder, request):
    plain = texts(engine(None), PROMPT)[0]
    assert_equal(texts(engine(folder), PROMPT)[0], plain)
    request.getfixturevalue("no_encoder")
    assert_equal(texts(engine(folder), PROMPT)[0], plain)


def test_a_python_engine_keeps_nothing_unless_it_is_told_where(folder, monkeypatch):
    monkeypatch.setenv("MINIDIT_CACHE_DIR", str(folder))
    texts(engine(None), PROMPT)
    assert not folder.exists()


@pytest.mark.parametrize("changed", ["weights", "config", "dtype", "prompt", "negative", "source", "threads"])
def test_whatever_decides_the_states_decides_the_key(folder, monkeypatch, changed):
    one, prompts = engine(folder), [PROMPT, "blur"]
    key = one.text_key(prompts)
    assert key == engine(folder).text_key(prompts)  # and nothing else
    part = one.manifest.components["text_encoder"]
    if changed == "weights":
        files = (replace(part.files[0], sha256="0" * 64),)
        one.manifest.components["text_encoder"] = replace(part, files=files)
    elif changed == "config":
        config = replace(part.config, eps=1e-3)
        one.manifest.components["text_encoder"] = replace(part, config=config)
    elif changed == "dtype":
        one.dtype = "bf16"
    elif changed in ("prompt", "negative"):
        prompts = ["a blue circle", "blur"] if changed == "prompt" else [PROMPT, ""]
    elif changed == "source":
        monkeypatch.setattr("minidit.generate.source_hash", lambda: "another")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert one.text_key(prompts) != key


def test_the_vae_and_the_transformer_do_not_matter_to_the_key(folder):
    one = engine(folder)
    key = one.text_key([PROMPT])
    vae = one.manifest.components["vae"]
    one.manifest.components["vae"] = replace(vae, files=(replace(vae.files[0], sha256="0" * 64),))
    assert one.text_key([PROMPT]) == key


def test_the_source_of_the_encoding_is_part_of_the_key(tmp_path, monkeypatch):
    before = states.source_hash()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "prompts.py").write_text("other")
    monkeypatch.setattr(states, "ROOT", tmp_path)
    assert states.source_hash.__wrapped__() != before


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "replaced"])
def test_a_damaged_entry_is_made_again_without_a_word(folder, damage):
    good = texts(engine(folder), PROMPT)[0]
    (path,) = folder.iterdir()
    data = path.read_bytes()
    broken = {"emptied": b"", "cut": data[:-5], "replaced": b"nothing", "flipped": data[:-1] + b"\x7f"}[
        damage
    ]
    assert broken != data
    path.write_bytes(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(texts(engine(folder), PROMPT)[0], good)
    (entry,) = folder.iterdir()
    assert_equal(TextCache(folder).load(entry.stem, "cpu"), good)


def test_what_was_not_used_for_longest_gives_way(folder):
    entry = [torch.zeros(250)]  # 1000 bytes and a header
    cache = TextCache(folder, limit=4000)
    for number, key in enumerate("abc"):
        cache.save(key, entry)
        states.os.utime(cache.path(key), (number, number))
    assert cache.load("a", "cpu") is not None  # used now
    cache.save("d", entry)
    assert {path.stem for path in folder.iterdir()} == {"a", "c", "d"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4000
    cache.save("e", [torch.zeros(2000)])  # more than all together may take
    assert {path.stem for path in folder.iterdir()} == {"a", "c", "d"}


def test_texts_of_every_kind_come_back(folder):
    kinds = [
        torch.arange(6.0).reshape(2, 3).bfloat16(),
        None,
        (torch.ones(2, 2), torch.zeros(3)),
        (torch.ones(1),),
    ]
    cache = TextCache(folder)
    cache.save("k", kinds)
    back = cache.load("k", "cpu")
    assert back[1] is None and isinstance(back[2], tuple) and isinstance(back[3], tuple)
    assert_equal([back[0], *back[2], *back[3]], [kinds[0], *kinds[2], *kinds[3]])
    assert cache.load("other", "cpu") is None


def test_a_family_with_two_encoders_needs_neither(hunyuan_folder, folder, request):  # noqa: F811
    make = lambda: Engine(hunyuan_folder, device="cpu", dtype="fp32", text_cache=folder)
    ((first,),) = texts(make(), "a cat")
    request.getfixturevalue("no_encoder")
    ((again,),) = texts(make(), "a cat")
    assert len(first) == 2
    assert_equal(list(again), list(first))


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="text states are not kept in .*file.*; --no-text-cache or MINIDIT"):
        texts(engine(tmp_path / "file" / "texts"), PROMPT)


def test_the_command_line_keeps_texts_unless_it_is_told_not_to(tmp_path, folder, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIDIT_CACHE_DIR", str(folder))
    assert main(["generate", PROMPT, *SMALL, "--output", "none.npz", "--no-text-cache"]) == 0
    assert not folder.exists()
    assert main(["generate", PROMPT, *SMALL, "--output", "first.npz"]) == 0
    assert len(list((folder / "text").iterdir())) == 1
    request.getfixturevalue("no_encoder")
    assert main(["generate", PROMPT, *SMALL, "--output", "again.npz"]) == 0
    frames = [read_video(f"{name}.npz")[0] for name in ("none", "first", "again")]
    assert (frames[0] == frames[1]).all() and (frames[0] == frames[2]).all()
    assert read_settings("none.npz") == read_settings("again.npz")


def test_the_folder_follows_the_xdg_rule(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("MINIDIT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_folder() == Path("/home/someone/.cache/minidit/text")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the rule
    assert default_folder() == Path("/home/someone/.cache/minidit/text")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/x")
    assert default_folder() == Path("/var/cache/x/minidit/text")
    monkeypatch.setenv("MINIDIT_CACHE_DIR", "/data/m")
    assert default_folder() == Path("/data/m/text")
