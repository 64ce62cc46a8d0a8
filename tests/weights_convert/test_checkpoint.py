import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.weights_convert.tiny import UMT5, original, save_sharded
from weights_convert.checkpoint import find_files, group_shards, open_checkpoint


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickle_gives_the_tensors_that_were_saved(tmp_path, is_zip):
    tensors = original(UMT5)
    path = tmp_path / "t5.pth"
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=is_zip)
    found = open_checkpoint([path])
    assert found.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    assert all(torch.equal(found.tensors[name].read(), t) for name, t in tensors.items())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, is_zip):
    path, witness = tmp_path / "model.pth", tmp_path / "witness"
    if is_zip:
        torch.save({"weight": Hostile(witness)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Hostile(witness)}, protocol=2))
    with pytest.raises(ValueError, match="refused, only pickles of plain tensors"):
        open_checkpoint([path])
    assert not witness.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, name, keep):
    path = tmp_path / name
    save_file(original(UMT5), path) if name.endswith("safetensors") else torch.save(original(UMT5), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep in (0, 7) else keep * len(data))])
    with pytest.raises(ValueError, match=re.escape(name)):
        open_checkpoint([path])


def test_shards_are_one_checkpoint(tmp_path):
    tensors = original(UMT5)
    (group,) = group_shards(find_files(save_sharded(tensors, tmp_path / "t5"), (".safetensors",)))
    found = open_checkpoint(group)
    assert len(group) == 3 and found.shapes.keys() == tensors.keys()


def test_a_missing_shard_is_counted(tmp_path):
    folder = save_sharded(original(UMT5), tmp_path / "t5")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="only 2 of 3 shards"):
        group_shards(find_files(folder, (".safetensors",)))


def test_shards_must_hold_what_the_index_lists(tmp_path):
    tensors = original(UMT5)
    folder = save_sharded(tensors, tmp_path / "t5")
    last = folder / "model-00003-of-00003.safetensors"
    save_file({"norm.weight": tensors["norm.weight"]}, last)
    with pytest.raises(ValueError, match="are in no shard|both hold"):
        open_checkpoint(sorted(folder.glob("*.safetensors")))


def test_hidden_folders_below_the_source_are_left_out(tmp_path):
    source = tmp_path / ".cache" / "snapshot"  # the source itself may lie in one
    (source / ".git").mkdir(parents=True)
    (source / "vae").mkdir()
    for folder in (source, source / ".git", source / "vae"):
        (folder / "a.pth").touch()
    assert find_files(source, (".pth",)) == [source / "a.pth", source / "vae" / "a.pth"]
