"""What is read and written against safetensors and torch themselves; damaged files are refused, whatever they hold."""

from __future__ import annotations

import functools
import io
import os
import stat
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from dsa_engine.checkpoints.tensor_io import DTYPES, open_checkpoint, write_tensors


def tensors():
    """Every dtype, among them tensors without axes and without elements."""
    made = {}
    for code, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5)) if dtype == torch.bool else torch.randn(3, 5) * 10
        made |= {f"{code}.matrix": values.to(dtype), f"{code}.row": values[0, :3].to(dtype)}
        made |= {f"{code}.one": values[0, 0].to(dtype), f"{code}.none": values[:0].to(dtype)}
    return {name: tensor.clone() for name, tensor in made.items()}  # the library refuses views of one another


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert actual[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_what_the_library_writes_is_read(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors", {"about": "this"})
    file, made = open_checkpoint(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert file.header == {"about": "this"} and file.files == (tmp_path / "a.safetensors",) and file.key is None
    assert_same({name: entry.read() for name, entry in file.tensors.items()}, made)
    for name, entry in file.tensors.items():
        held = made[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (held.dtype, tuple(held.shape), held.nbytes)


def test_what_is_written_the_library_reads(tmp_path):
    made = tensors()
    made["turned"] = torch.randn(4, 6).T
    made["parameter"] = torch.nn.Parameter(torch.randn(2))
    write_tensors(tmp_path / "new" / "a.safetensors", made, {"about": "that"})
    assert_same(load_file(tmp_path / "new" / "a.safetensors"), made)
    with safe_open(tmp_path / "new" / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "about": "that"}
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new" / "a.safetensors").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("kind", ["zip", "zip, compressed again", "legacy"])
def test_what_torch_saves_is_read(tmp_path, kind, monkeypatch):
    """Views of one storage, strides of every kind, parameters; from archives with plain records, and from others."""
    base = torch.randn(4, 6, 5)
    made = tensors() | {
        "base": base,
        "turned": base.permute(2, 0, 1),
        "inside": base[1:3, ::2],
        "one row": base[3, 5],
        "wide": torch.randn(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    if kind == "legacy":  # it has no such dtype
        made = {name: tensor for name, tensor in made.items() if "float8" not in str(tensor.dtype)}
    path = tmp_path / "a.pt"
    torch.save({"step": 3, "model": made}, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "zip, compressed again":
        with zipfile.ZipFile(path) as archive:
            content = {record.filename: archive.read(record) for record in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    calls = []
    monkeypatch.setattr(torch, "load", lambda *args, own=torch.load, **how: calls.append(how) or own(*args, **how))
    file = open_checkpoint(path)
    assert file.key == "model" and [how["map_location"] for how in calls] == ["meta"]  # nothing is read to open it
    read = {name: tensor.read() for name, tensor in file.tensors.items()}
    assert [how["mmap"] for how in calls[1:]] == [kind == "zip"]
    assert_same(read, {name: tensor.detach() for name, tensor in made.items()})
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in read.values())


def test_a_dtype_is_for_floating_point_only(tmp_path):
    made = {"weights": torch.randn(3, 3), "count": torch.tensor(7)}
    write_tensors(tmp_path / "a.safetensors", made, dtype=torch.bfloat16)
    assert_same(load_file(tmp_path / "a.safetensors"), {**made, "weights": made["weights"].bfloat16()})


def test_a_tensor_that_is_read_is_its_readers_own(tmp_path):
    made = {"a": torch.randn(4)}
    for name, writer in (("a.safetensors", save_file), ("a.pt", torch.save)):
        writer(made, tmp_path / name)
        entry = open_checkpoint(tmp_path / name).tensors["a"]
        entry.read().zero_()
        assert entry.read().equal(made["a"])
        assert entry.read("meta").is_meta


def test_a_file_that_shrinks_while_it_is_used_is_named(tmp_path):
    save_file({"a": torch.randn(400)}, tmp_path / "a.safetensors")
    entry = open_checkpoint(tmp_path / "a.safetensors").tensors["a"]
    os.truncate(tmp_path / "a.safetensors", 900)
    with pytest.raises(ValueError, match="a.safetensors: .* bytes fewer than when it was opened"):
        entry.read()


WHOLE = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int8)}, {"about": "x"})
END = 8 + int.from_bytes(WHOLE[:8], "little")


@given(st.lists(st.tuples(st.integers(0, END - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(-9, 9))
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(tmp_path_factory, changes, longer):
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place] = byte
    data = data[:longer] if longer < 0 else data + b"\0" * longer
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    path.write_bytes(data)
    try:
        ours = {name: entry.read() for name, entry in open_checkpoint(path).tensors.items()}
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert_same(ours, load_file(path))


def test_a_header_whose_length_looks_like_text_is_none(tmp_path):
    """60 is the code of <, with which a web page begins; a length is not the beginning of a text."""
    for length in range(60, 60 + 256 * 3, 256):
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\7")
        assert open_checkpoint(tmp_path / "a.safetensors").tensors["a"].read().tolist() == [7]


@functools.cache
def archive() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int8)}}, file)
    return file.getvalue()


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(-9, 9))
def test_a_damaged_archive_is_read_or_refused(tmp_path_factory, changes, longer):
    data = bytearray(archive())
    for place, byte in changes:
        data[-1 - int(place * (len(data) - 1))] = byte
    data = data[:longer] if longer < 0 else data + b"\0" * longer
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    path.write_bytes(data)
    try:
        [entry.read() for entry in open_checkpoint(path).tensors.values()]
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"{}x",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}',
        b"[" * 100_000,
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="a.safetensors: not a whole safetensors file"):
        open_checkpoint(path)
