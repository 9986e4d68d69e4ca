"""Files that promise more than they hold, or more than the machine has: refused by their headers."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tcsae.errors import ResourceError, RunError
from tcsae.train.formats import tensor_files
from tcsae.train.formats.tensor_files import read_npz, read_safetensors, read_torch


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(tensor_files, "free_memory", lambda: 1 << 20)


def test_what_was_written_is_read(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(2.5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save({**tensors, "transposed": tensors["a"].T, "part": tensors["a"][1:, 2:], "name": "x"}, tmp_path / "a.pt")
    np.savez_compressed(tmp_path / "a.npz", a=tensors["a"].numpy(), other=np.array(["text"]))
    found = read_torch(tmp_path / "a.pt")
    for name, value in tensors.items():
        assert torch.equal(read_safetensors(tmp_path / "a.safetensors")[name], value)
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype
    assert torch.equal(found["transposed"], tensors["a"].T)
    assert torch.equal(found["part"], tensors["a"][1:, 2:])
    assert "name" not in found
    assert torch.equal(read_npz(tmp_path / "a.npz", ["a", "missing"])["a"], tensors["a"])


def test_a_module_with_parameters_and_metadata_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    assert torch.equal(read_torch(tmp_path / "a.pt")["0.weight"], module[0].weight)
    torch.save(dict(module.named_parameters()), tmp_path / "a.pt")
    assert torch.equal(read_torch(tmp_path / "a.pt")["0.bias"], module[0].bias)


def test_a_small_archive_of_a_large_array_is_refused_before_it_is_unpacked(tmp_path, little_memory):
    np.savez_compressed(tmp_path / "a.npz", W_enc=np.zeros((1000, 1000), np.float32))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    with pytest.raises(ResourceError, match=r"needs 8 MB of memory"):
        read_npz(tmp_path / "a.npz", ["W_enc"])


@pytest.mark.parametrize("read", [read_torch, read_safetensors])
def test_what_does_not_fit_into_memory_is_refused(tmp_path, little_memory, read):
    tensors = {"a": torch.zeros(1000, 1000)}
    torch.save(tensors, tmp_path / "a") if read is read_torch else save_file(tensors, tmp_path / "a")
    with pytest.raises(ResourceError, match=r"needs 8 MB of memory, this machine has"):
        read(tmp_path / "a")


def test_a_tensor_larger_than_its_record_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 14, 1 << 14)}, tmp_path / "a.pt")
    with pytest.raises(RunError, match=r"a tensor of \[16384, 16384\] in a record of 1 elements"):
        read_torch(tmp_path / "a.pt")


def edited(file, change):
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    listing = next(name for name in members if name.endswith("data.pkl"))
    members[listing] = change(members[listing])
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_listing_that_lies_about_its_records_is_refused(tmp_path):
    torch.save({"a": torch.ones(20)}, tmp_path / "a.pt")
    edited(tmp_path / "a.pt", lambda listing: listing.replace(b"K\x14", b"K\xff"))  # 20 elements become 255
    with pytest.raises(RunError, match=r"a tensor of \[255\] in a record of 20 elements"):
        read_torch(tmp_path / "a.pt")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize("where", ["value", "key", "inside"])
def test_no_code_of_a_file_is_run(tmp_path, where):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    trap = {"value": {"a": Trap()}, "key": {Trap(): 1}, "inside": {"a": [{"b": Trap()}]}}[where]
    edited(tmp_path / "a.pt", lambda _: pickle.dumps(trap, protocol=2))
    with pytest.raises(RunError, match="holds more than weights and is not loaded, for safety"):
        read_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("change", [{"shape": [1 << 40, 4]}, {"data_offsets": [0, 1 << 50]}, {"dtype": "F999"}])
def test_a_safetensors_header_that_lies_is_refused(tmp_path, change):
    save_file({"a": torch.ones(3, 4)}, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"] |= change
    raw = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    with pytest.raises((RunError, ResourceError)):
        read_safetensors(tmp_path / "a")
