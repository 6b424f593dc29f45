"""A corpus holds every token, says what it is, and is never read once a byte of it is wrong."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.data import corpus, tokenizers

DOCUMENTS = [f"document {i} " + "words and more " * (i % 7) + "ü" * (i % 3) for i in range(60)]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(DOCUMENTS))
    return f"lines:{path}"


@pytest.fixture
def folder(tmp_path, lines):
    corpus.build(lines, "word", tmp_path / "corpus", validation=0.1, shard_tokens=50)
    return tmp_path / "corpus"


def whole(split):
    return split.window(0, split.tokens)


def test_splits_hold_every_token_of_every_document_in_order(folder):
    opened = corpus.Corpus(folder)
    tokenizer = opened.tokenizer()
    for name, documents in (("train", DOCUMENTS[:54]), ("validation", DOCUMENTS[54:])):
        expected = [np.append(tokenizer.encode(text), tokenizer.eos_id) for text in documents]
        split = opened.split(name)
        assert np.array_equal(whole(split), np.concatenate(expected)) and whole(split).dtype == np.int32
        starts = np.cumsum([0, *map(len, expected)])[:-1]
        assert np.array_equal(split.starts(0, split.tokens), starts)
        assert (split.tokens, split.documents) == (sum(map(len, expected)), len(documents))
        assert split.text_bytes == sum(len(text.encode()) for text in documents)
    assert len(opened.manifest["shards"]) > 5 and opened.manifest["dtype"] == "uint16"


def test_any_window_is_a_slice_of_the_whole(folder):
    split = corpus.Corpus(folder).split("train")
    tokens, starts = whole(split), split.starts(0, split.tokens)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, split.tokens, 200):
        length = int(rng.integers(1, split.tokens - start + 1))
        assert np.array_equal(split.window(int(start), length), tokens[start : start + length])
        inside = starts[(starts >= start) & (starts < start + length)] - start
        assert np.array_equal(split.starts(int(start), length), inside)


def test_every_token_knows_its_document_across_shards(folder):
    split = corpus.Corpus(folder).split("train")
    starts = np.append(split.starts(0, split.tokens), split.tokens)
    for position in range(split.tokens):
        k = np.searchsorted(starts, position, "right")
        assert split.bounds(position) == (starts[k - 1], starts[k])
    assert split.eos_id == corpus.Corpus(folder).tokenizer().eos_id and split.word_starts.all()
    for start, length in ((-1, 2), (0, split.tokens + 1), (split.tokens, 1), (3, 0)):
        with pytest.raises(ValueError, match="outside"):
            split.window(start, length)


def test_one_document_is_divided_by_its_characters(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1003))
    (tmp_path / "one.txt").write_text(text)
    built = corpus.build(f"text:{tmp_path}/one.txt", "char", tmp_path / "c", validation=0.1)
    tokenizer = built.tokenizer()
    assert tokenizer.decode(whole(built.split("train"))) == text[: int(0.9 * 1003)]
    assert tokenizer.decode(whole(built.split("validation"))) == text[int(0.9 * 1003) :]


def test_a_validation_source_is_kept_apart_and_char_keeps_its_types_too(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("xyz")
    built = corpus.build(f"text:{tmp_path}/a.txt", "char", tmp_path / "c", validation_source=f"text:{tmp_path}/b.txt")
    assert built.vocab_size == 6 and whole(built.split("validation")).tolist() == [3, 4, 5]


def test_python_brings_its_own_validation_files(tmp_path):
    built = corpus.build("python", "byte", tmp_path / "c")
    assert built.split("train").documents > 10 * built.split("validation").documents > 0


def test_word_ends_a_document_once(tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree\n")
    (tmp_path / "b.txt").write_text("four")
    built = corpus.build(f"text:{tmp_path}/*.txt", "word", tmp_path / "c")
    tokenizer = built.tokenizer()
    text = [tokenizer.piece(i) for i in whole(built.split("train"))]
    assert text == ["one", "two", "<eos>", "three", "<eos>", "four", "<eos>"]


def test_long_documents_are_tokenised_in_blocks_without_a_difference(tmp_path, monkeypatch):
    text = "some words in a row\nand another line\n" * 500
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(corpus, "_BATCH_CHARACTERS", 300)
    built = corpus.build(f"text:{tmp_path}/a.txt", "bpe:290", tmp_path / "c")
    split, tokenizer = built.split("train"), built.tokenizer()
    assert np.array_equal(whole(split), np.append(tokenizer.encode(text), tokenizer.eos_id))
    assert split.documents == 1 and split.text_bytes == len(text)


def test_large_vocabularies_take_four_bytes(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(70_000)))
    built = corpus.build(f"text:{tmp_path}/a.txt", "word", tmp_path / "c")
    assert built.manifest["dtype"] == "uint32"
    assert np.array_equal(np.sort(whole(built.split("train"))), np.arange(70_001))


def test_the_same_build_is_kept_and_another_is_refused(tmp_path, lines, folder):
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    corpus.build(lines, "word", folder, validation=0.1, shard_tokens=50)
    assert before == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    with pytest.raises(UsageError, match="validation=0.1, not 0.2.*another --out"):
        corpus.build(lines, "word", folder, validation=0.2, shard_tokens=50)
    (tmp_path / "lines.txt").write_text("changed")
    with pytest.raises(UsageError, match="source_size"):
        corpus.build(lines, "word", folder, validation=0.1, shard_tokens=50)


def test_the_digest_depends_on_tokens_and_on_nothing_else(tmp_path, lines, folder):
    digest = corpus.Corpus(folder).digest
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    assert corpus.Corpus(other).digest == digest
    (tmp_path / "lines.txt").write_text("\n".join(DOCUMENTS).replace("document 3", "document 4"))
    again = corpus.build(lines, "word", tmp_path / "again", validation=0.1, shard_tokens=50)
    assert again.digest != digest


def test_a_given_tokenizer_or_its_file_is_used_and_kept(tmp_path, lines):
    tokenizer = tokenizers.train("bpe", DOCUMENTS, 300)
    file = tokenizer.save(tmp_path / "my.model")
    built = corpus.build(lines, file, tmp_path / "a")
    assert corpus.build(lines, tokenizer, tmp_path / "a").digest == built.digest
    assert built.tokenizer_digest == tokenizer.digest == built.tokenizer().digest
    os.remove(file)
    assert corpus.Corpus(tmp_path / "a").tokenizer().decode(whole(built.split("train"))[:5])


def test_an_opened_split_can_be_pickled(folder):
    split = corpus.Corpus(folder).split("train")
    assert np.array_equal(whole(pickle.loads(pickle.dumps(split))), whole(split))


def damage(folder, kind, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    if kind == "cut by a byte":
        path.write_bytes(data[:-1])
    elif kind == "one byte more":
        path.write_bytes(data + b"\0")
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "deleted":
        path.unlink()
    elif kind == "bit flipped":
        data[-3] ^= 4
        path.write_bytes(data)
    elif kind == "header":
        path.write_bytes(data.replace(b"<u2", b"<i2").replace(b"<i8", b"<f8"))


@pytest.mark.parametrize("name", ["train-00001.npy", "train-00000.starts.npy", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["cut by a byte", "one byte more", "emptied", "deleted"])
def test_a_damaged_file_is_refused_at_opening_by_name(folder, kind, name):
    damage(folder, kind, name)
    with pytest.raises(UsageError, match=name):
        corpus.Corpus(folder)


@pytest.mark.parametrize("name", ["train-00001.npy", "train-00000.starts.npy"])
def test_a_shard_of_another_type_is_refused_at_opening_by_name(folder, name):
    damage(folder, "header", name)
    with pytest.raises(UsageError, match=name):
        corpus.Corpus(folder)


@pytest.mark.parametrize("name", ["train-00001.npy", "validation-00000.npy", "train-00000.starts.npy"])
def test_a_flipped_bit_is_found_by_verify(folder, name):
    assert corpus.verify(folder) > 0
    damage(folder, "bit flipped", name)
    with pytest.raises(UsageError, match=name):
        corpus.verify(folder)


def test_a_flipped_bit_of_the_tokenizer_is_found_before_it_is_used(folder):
    damage(folder, "bit flipped", "tokenizer.json")
    with pytest.raises(UsageError, match="tokenizer.json changed"):
        corpus.Corpus(folder).tokenizer()


@pytest.mark.parametrize("kind", ["cut by a byte", "emptied", "deleted"])
def test_a_damaged_manifest_is_refused(folder, kind):
    damage(folder, kind, "manifest.json")
    if kind == "cut by a byte":
        damage(folder, kind, "manifest.json")
    with pytest.raises(UsageError, match="manifest.json"):
        corpus.Corpus(folder)


def rewrite(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(corpus._sealed(manifest)))


def test_a_changed_digit_in_the_manifest_is_found(folder):
    path = folder / "manifest.json"
    size = str(corpus.Corpus(folder).split("train").text_bytes)
    path.write_text(path.read_text().replace(size, str(int(size) + 1)))
    with pytest.raises(UsageError, match="manifest.json changed"):
        corpus.Corpus(folder)


@pytest.mark.parametrize("key", ["tokenizer", "shards", "splits", "dtype"])
def test_a_manifest_without_a_part_is_refused(folder, key):
    manifest = json.loads((folder / "manifest.json").read_text())
    for value in (None, {}, "x", [3]):
        rewrite(folder, manifest | {key: value})
        with pytest.raises(UsageError):
            corpus.Corpus(folder)


@pytest.mark.parametrize(
    "name", ["../secret.npy", "/etc/passwd", "..", "", ".", "a/b.npy", "a\\b.npy", "x\0.npy", "link.npy", ".hidden", 3]
)
def test_a_name_outside_the_folder_is_refused(tmp_path, folder, name):
    (tmp_path / "secret.npy").write_bytes((folder / "train-00000.npy").read_bytes())
    os.symlink(tmp_path / "secret.npy", folder / "link.npy")
    for change in ("shard", "starts", "tokenizer"):
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = manifest["shards"][0]
        {"shard": entry, "starts": entry["starts"], "tokenizer": manifest["tokenizer"]}[change]["file"] = name
        copy = tmp_path / f"copy-{change}"
        shutil.copytree(folder, copy, symlinks=True)
        rewrite(copy, manifest)
        with pytest.raises(UsageError, match="not a file in its own folder|is damaged"):
            corpus.Corpus(copy)


def test_a_pickled_array_is_never_loaded(folder):
    path = folder / "train-00001.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = path.stat().st_size
    rewrite(folder, manifest)
    with pytest.raises(UsageError, match="train-00001"):
        corpus.Corpus(folder)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_source_is_refused_and_leaves_nothing(tmp_path, text):
    (tmp_path / "e.txt").write_text(text)
    with pytest.raises(UsageError, match="holds no text"):
        corpus.build(f"lines:{tmp_path}/e.txt", "byte", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 1.0}, "from 0 to below 1"),
        ({"validation": 0.1, "validation_source": "python"}, "not both"),
        ({"tokenizer": "bqe"}, "no tokenizer file bqe"),
        ({"tokenizer": "bpe:x"}, "whole number"),
        ({"tokenizer": "bpe:99999"}, "vocab_size=99999"),
        ({"out": "gs://bucket/c"}, "local path"),
    ],
)
def test_impossible_settings_are_refused_and_leave_nothing(tmp_path, lines, options, message):
    settings = {"tokenizer": "byte", "out": tmp_path / "c"} | options
    with pytest.raises(UsageError, match=message):
        corpus.build(lines, settings.pop("tokenizer"), settings.pop("out"), **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["lines.txt"]


def test_a_folder_of_other_things_is_left_alone(tmp_path, lines):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a corpus"):
        corpus.build(lines, "byte", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_missing_folders_and_splits_are_named(tmp_path, lines):
    corpus.build(lines, "byte", tmp_path / "shakespeare")
    with pytest.raises(UsageError, match="did you mean shakespeare"):
        corpus.Corpus(tmp_path / "shakespere")
    with pytest.raises(UsageError, match="no manifest.json"):
        corpus.Corpus(tmp_path)
    with pytest.raises(UsageError, match="--validation=0.1"):
        corpus.Corpus(tmp_path / "shakespeare").split("validation")


BUILD = """
import sys, time
from lm.data import corpus
def slowly(stage, done, total):
    print(stage, flush=True)
    time.sleep(float(sys.argv[3]))
corpus._BATCH_CHARACTERS = 100
print(corpus.build(sys.argv[1], "byte", sys.argv[2], progress=slowly).digest)
"""


def start(lines, out, pause):
    command = [sys.executable, "-c", BUILD, lines, str(out), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_no_corpus_and_starts_over(tmp_path, lines):
    out = tmp_path / "c"
    process = start(lines, out, 0.01)
    for line in process.stdout:
        if line.startswith("tokenising"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists() and (tmp_path / "c.building").exists()
    built = corpus.build(lines, "byte", out)
    assert corpus.verify(out) and not (tmp_path / "c.building").exists()
    assert built.digest == corpus.build(lines, "byte", tmp_path / "d").digest


def test_two_builders_of_one_corpus_wait_for_each_other(tmp_path, lines):
    out = tmp_path / "c"
    first = start(lines, out, 0.005)
    first.stdout.readline()
    began = time.monotonic()
    second = corpus.build(lines, "byte", out)
    printed = first.communicate()[0]
    assert first.returncode == 0 and printed.split()[-1] == second.digest
    assert time.monotonic() - began > 0.1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "lines.txt"]


def test_penn_treebank_has_its_published_counts(shared_data, tmp_path):
    ptb = shared_data / "ptb"
    built = corpus.build(
        f"text:{ptb}/ptb.train.txt.gz", "word", tmp_path / "c", validation_source=f"text:{ptb}/ptb.valid.txt"
    )
    assert built.vocab_size == 10_000
    assert (built.split("train").tokens, built.split("validation").tokens) == (929_589, 73_760)


def test_tinyshakespeare_is_divided_as_in_nanogpt(shared_data, tmp_path):
    source = f"text:{shared_data}/tinyshakespeare/input.txt"
    built = corpus.build(source, "char", tmp_path / "c", validation=0.1)
    assert built.vocab_size == 65
    assert (built.split("train").tokens, built.split("validation").tokens) == (1_003_854, 111_540)
