"""Small files are written whole or not at all."""

import os

import pytest

from lm.core import files


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    name = tmp_path / "a.json"
    files.write_json(name, {"x": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        files.write_json(name, {"x": 2})
    assert files.read_json(name) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "fsync_folder", lambda name: synced.append(str(name)))
    files.write_bytes(tmp_path / "a", b"x")
    assert synced == [str(tmp_path)]


def test_a_torn_last_row_is_left_out_and_a_torn_middle_row_is_not_hidden(tmp_path):
    name = tmp_path / "rows.jsonl"
    name.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_jsonl(name) == [{"a": 1}, {"a": 2}]
    name.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError):
        files.read_jsonl(name)
