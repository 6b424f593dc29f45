"""Sources give documents in a fixed order, and survive whatever lies in files."""

import collections
import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from lm.core.errors import UsageError
from lm.data import clean, files, sources, synthetic


def read(source):
    counts = collections.Counter()
    return list(sources.documents(source, counts)), counts


def test_text_is_one_document_a_file_and_lines_one_a_line(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\n\n \nthree")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    assert read(f"text:{tmp_path}/*.txt")[0] == ["first", "one\r\ntwo\n\n \nthree"]
    assert read(f"lines:{tmp_path}/b.txt")[0] == ["one", "two", "three"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_files_read_like_plain_ones_also_in_several_members(tmp_path, pack):
    text = "größe 漢字 😀\n" * 3000
    suffix = "gz" if pack is gzip.compress else "zst"
    half = len(text) // 2
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack(text[:half].encode()) + pack(text[half:].encode()))
    assert read(f"text:{tmp_path}/**/*.{suffix}")[0] == [text]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_cut_and_flipped_archives_are_refused(tmp_path, pack):
    noise = np.random.default_rng(0).integers(32, 127, 50_000, np.uint8).tobytes()
    whole = pack(noise)
    path = tmp_path / ("x.gz" if pack is gzip.compress else "x.zst")
    path.write_bytes(whole[:-9])
    with pytest.raises(UsageError, match="damaged"):
        read(f"text:{path}")
    path.write_bytes(b"\0" + whole[1:])
    with pytest.raises(UsageError, match="damaged"):
        read(f"text:{path}")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bomb_is_refused(tmp_path, suffix):
    path = tmp_path / f"bomb.{suffix}"
    pack = io.BytesIO()
    opened = (
        gzip.GzipFile(fileobj=pack, mode="wb") if suffix == "gz" else zstandard.ZstdCompressor().stream_writer(pack)
    )
    for _ in range(80):
        opened.write(bytes(1 << 20))
    opened.flush()
    data = pack.getvalue()
    path.write_bytes(data)
    with pytest.raises(UsageError, match="unpacks to more than 100 times"):
        for _ in sources.documents(f"lines:{path}"):
            pass


@pytest.mark.slow
def test_a_sparse_line_of_two_gigabytes_passes_in_one_gigabyte_of_memory(tmp_path):
    path = tmp_path / "sparse.txt"
    with open(path, "wb") as f:
        f.truncate(2 << 30)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from lm.data import files\n"
        "print(sum(len(part) for part, _ in files.lines(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 << 30


def test_long_lines_are_cut_between_characters_and_counted(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("äöü漢字😀" * 50 + "\nshort\n")
    parts = list(files.lines(str(path), limit=16))
    assert b"".join(part for part, _ in parts[:-1]).decode() == "äöü漢字😀" * 50
    assert parts[-1] == (b"short", False)
    assert all(len(part) <= 16 and part.decode() for part, _ in parts)
    assert b"".join(files.pieces(str(path), limit=16)) == path.read_bytes()


def test_a_json_line_beyond_the_limit_is_dropped_and_counted(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    rows = [{"text": "a"}, {"text": "b" * 500}, {"text": "\ud800c"}]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    short = files.lines
    monkeypatch.setattr(files, "lines", lambda file: short(file, limit=100))
    texts, counts = read(f"jsonl:{path}")
    assert texts == ["a", "\ufffdc"]
    assert counts["dropped_lines"] == 1 and counts["malformed_characters"] == 1


@pytest.mark.parametrize("line", ["{", "[1]", '{"body": "x"}', '{"text": 3}', "[" * 100_000])
def test_json_without_the_field_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match="line 3"):
        read(f"jsonl:{path}")


def test_jsonl_takes_the_named_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "body": "b"}\n')
    assert read(f"jsonl:{tmp_path}/x.jsonl#body")[0] == ["b"]


@pytest.mark.parametrize(
    ("data", "text", "count"),
    [
        (b"a\xffb", "a\ufffdb", 1),
        (b"\xc0\xaf", "\ufffd\ufffd", 2),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", 3),
        (b"\xef\xbb\xbfx", "x", 0),
        (b"a\0b", "a\0b", 0),
        ("kept \ufffd".encode(), "kept \ufffd", 0),
    ],
)
def test_malformed_utf8_is_replaced_and_counted(tmp_path, data, text, count):
    (tmp_path / "x.txt").write_bytes(data)
    texts, counts = read(f"text:{tmp_path}/x.txt")
    assert texts == [text] and counts["malformed_characters"] == count


def test_utf16_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes("hello".encode("utf-16"))
    with pytest.raises(UsageError, match="UTF-16"):
        read(f"text:{tmp_path}/x.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("txt:a", "did you mean text"),
        ("text:", "needs something"),
        ("text:{0}/inptu.txt", "did you mean input.txt"),
        ("text:{0}/*.md", "no file matches"),
        ("text:{0}", "is a folder"),
        ("{0}/input.txt", "needs a kind: text:"),
        ("python:test", "train"),
        ("synthetic:makrov", "did you mean markov"),
        ("synthetic:markov?symbol=3", "did you mean symbols"),
        ("synthetic:markov?symbols=x", "int"),
        ("synthetic:markov?symbols=1", "2 to 20,000"),
    ],
)
def test_a_mistaken_source_is_refused_before_it_is_read(tmp_path, source, message):
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(UsageError, match=message):
        sources.documents(source.format(tmp_path))


def test_the_library_is_divided_into_two_parts_without_tests():
    whole, train, held = (sources._library(part) for part in ("", "train", "validation"))
    assert sorted(train + held) == whole == sorted(whole)
    assert 0.02 < len(held) / len(whole) < 0.12
    assert not any("/test/" in name or "site-packages" in name for name in whole)
    assert sources.held_out("python") == ("python:train", "python:validation")


def test_blocks_end_at_newlines_and_give_the_text_back():
    text = "a line\n" * 100 + "words without end " * 50 + "x" * 300
    parts = list(clean.blocks(text, 64))
    assert "".join(parts) == text and max(map(len, parts)) <= 64
    assert all(part.endswith("\n") for part in parts[:10])


@pytest.mark.parametrize("order", [1, 2])
def test_markov_text_has_its_entropy_rate(order):
    chain = synthetic.Markov(symbols=16, order=order, tokens=300_000, seed=3)
    symbols = chain.sample()
    assert np.array_equal(chain.read(chain.text()), symbols)
    surprise = -chain.log_probability(symbols)
    assert len(surprise) == len(symbols) - order
    # Surprises are correlated over a few steps: the error of the mean comes from batches of 1,000.
    batches = surprise[: len(surprise) // 1000 * 1000].reshape(-1, 1000).mean(1)
    error = batches.std(ddof=1) / np.sqrt(len(batches))
    assert abs(surprise.mean() - chain.entropy_rate) < 4 * error


def test_markov_transitions_are_those_observed():
    chain = synthetic.Markov(symbols=4, order=2, tokens=200_000)
    symbols = chain.sample()
    context = symbols[:-2] * 4 + symbols[1:-1]
    seen = np.zeros((16, 4))
    np.add.at(seen, (context, symbols[2:]), 1)
    assert np.abs(seen.sum(1) / seen.sum() - chain.stationary).max() < 0.01
    often = seen.sum(1) > 5000
    assert np.abs(seen[often] / seen[often].sum(1, keepdims=True) - chain.transition[often]).max() < 0.03


def test_markov_source_is_one_document_of_as_many_characters():
    (text,) = sources.documents("synthetic:markov?symbols=64&tokens=5000&seed=1")
    assert len(text) == 5000 and text == synthetic.Markov(tokens=5000, seed=1).text()


def test_tfds_reads_text_without_tensorflow(tmp_path):
    code = """import sys, tensorflow_datasets as tfds
from lm.data import sources
class LmTiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(5):
            yield i, {"text": f"document {i} é"}
LmTiny(file_format="array_record").download_and_prepare()
print(sorted(sources.documents("tfds:lm_tiny:train")))
for wrong in ("tfds:lm_tinny", "tfds:lm_tiny:train#body", "tfds:lm_tiny:tset"):
    try:
        list(sources.documents(wrong))
    except sources.UsageError as error:
        print("refused", len(str(error).splitlines()), str(error))
assert "tensorflow" not in sys.modules
"""
    (tmp_path / "tiny.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "tiny.py"],
        capture_output=True,
        text=True,
        env={"TFDS_DATA_DIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()[-4:]
    assert lines[0] == str([f"document {i} é" for i in range(5)])
    assert all(line.startswith("refused 1 ") for line in lines[1:]), lines
