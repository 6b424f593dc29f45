"""A corpus is a folder of token shards, document starts, their tokenizer and a manifest: built once, then mapped.

    manifest.json   tokenizer.*   train-00000.npy   train-00000.starts.npy   validation-00000.npy   ...

A shard is a one-dimensional .npy array of uint16 or uint32; its starts are the positions, int64, at which
documents begin. The manifest holds size and sha256 of every file, so that a damaged one is never read silently.
"""

import bisect
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm.core import files
from lm.core.errors import UsageError, unknown
from lm.data import clean, shards, sources, tokenizers, words

VERSION = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 26
_BATCH_CHARACTERS = 1 << 22

Progress = Callable[[str, int, int], None]  # (stage, characters done, characters in all or 0 where unknown)


class Split:
    """One split of a corpus: the tokens of all its shards as one sequence."""

    def __init__(self, corpus: "Corpus", name: str, entries: list[dict[str, Any]], text_bytes: int):
        self.name, self.text_bytes, self._corpus, folder = name, text_bytes, corpus, corpus.folder
        self.tokens = sum(entry["tokens"] for entry in entries)
        self.documents = sum(entry["documents"] for entry in entries)
        self._ends = list(itertools.accumulate(entry["tokens"] for entry in entries))
        self._files = [(str(folder / e["file"]), e["sha256"]) for e in entries]
        self._starts = [(str(folder / e["starts"]["file"]), e["starts"]["sha256"]) for e in entries]

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), int32; raises ValueError outside the split."""
        parts = [shards.map_array(*self._files[k])[a:b] for k, a, b in self._spans(start, length)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int32)

    def starts(self, start: int, length: int) -> np.ndarray:
        """The positions within that window at which a document begins, ascending int64."""
        found = []
        for k, a, b in self._spans(start, length):
            local = shards.map_array(*self._starts[k])
            low, high = local.searchsorted((a, b))
            if low < high:
                found.append(local[low:high] + (self._base(k) - start))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def bounds(self, position: int) -> tuple[int, int]:
        """(first, end) of the document that holds the token at `position`, which may go over several shards."""
        shard, first, end = bisect.bisect_right(self._ends, position), 0, self.tokens
        for k in range(shard, -1, -1):
            local = shards.map_array(*self._starts[k])
            if (i := local.searchsorted(position - self._base(k), "right")) > 0:
                first = self._base(k) + int(local[i - 1])
                break
        for k in range(shard, len(self._ends)):
            local = shards.map_array(*self._starts[k])
            if (i := local.searchsorted(position - self._base(k), "right")) < len(local):
                end = self._base(k) + int(local[i])
                break
        return first, end

    @property
    def eos_id(self) -> int | None:
        """The id that ends each document, where the tokenizer has one."""
        return self._corpus.manifest["tokenizer"]["eos_id"]

    @functools.cached_property
    def pieces(self) -> list[str]:
        """The readable name of each id."""
        return self._corpus.tokenizer().pieces

    @functools.cached_property
    def word_counts(self) -> np.ndarray:
        """int64 [vocabulary]: how often each word occurs, 0 for the ids that are none."""
        counts = np.zeros(self._corpus.vocab_size, np.int64)
        for file in self._files:
            counts += np.bincount(shards.map_array(*file), minlength=len(counts))
        return counts * words.is_word(self.pieces)

    @functools.cached_property
    def word_starts(self) -> np.ndarray:
        """bool [vocabulary]: which ids begin a word."""
        return words.word_starts(self._corpus.tokenizer())

    @functools.cached_property
    def sentence_ends(self) -> np.ndarray:
        """bool [vocab]: the ids that end a sentence, a line or a document."""
        return words.sentence_ends(self._corpus.tokenizer())

    def _spans(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """(shard, first, end) of the parts of a window."""
        if start < 0 or length < 1 or start + length > self.tokens:
            raise ValueError(f"window [{start}, {start + length}) is outside split {self.name} of {self.tokens} tokens")
        spans, end = [], start + length
        k = bisect.bisect_right(self._ends, start)
        while start < end:
            stop = min(end, self._ends[k])
            spans.append((k, start - self._base(k), stop - self._base(k)))
            start, k = stop, k + 1
        return spans

    def _base(self, k: int) -> int:
        return self._ends[k - 1] if k else 0


class Corpus:
    """An opened corpus folder; sizes and headers of all shards are checked, contents by `verify`.

    Raises UsageError for a folder without a manifest, and for a file that is missing, cut, of another type,
    or outside the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.manifest = _read_manifest(self.folder)
        try:
            self._open()
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self.folder / MANIFEST} is damaged ({error!r}): build the corpus again") from None

    def _open(self) -> None:
        tokenizer = self.manifest["tokenizer"]
        self.tokenizer_digest: str = tokenizer["sha256"]
        self.tokenizer_file = shards.inside(self.folder, tokenizer["file"])
        self.vocab_size: int = tokenizer["vocab_size"]
        shards.check_size(self.tokenizer_file, tokenizer["bytes"])
        by_split: dict[str, list[dict[str, Any]]] = {}
        for shard in self.manifest["shards"]:
            shards.check_array(
                shards.inside(self.folder, shard["file"]), shard["bytes"], self.manifest["dtype"], shard["tokens"]
            )
            starts = shard["starts"]
            shards.check_array(shards.inside(self.folder, starts["file"]), starts["bytes"], "int64", shard["documents"])
            by_split.setdefault(shard["split"], []).append(shard)
        if not by_split:
            raise KeyError("shards")
        texts = self.manifest["splits"]
        self.splits = {k: Split(self, k, found, texts[k]["text_bytes"]) for k, found in by_split.items()}

    @property
    def digest(self) -> str:
        """16 hex digits over what the tokens are: not over paths, settings or the build."""
        content = [[s["split"], s["tokens"], s["sha256"], s["starts"]["sha256"]] for s in self.manifest["shards"]]
        text = json.dumps([self.manifest["dtype"], self.tokenizer_digest, content])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def split(self, name: str) -> Split:
        """The split; raises UsageError with the names that there are."""
        if name not in self.splits:
            hint = "; build it with --validation=0.1" if name == "validation" else ""
            raise UsageError(f"corpus {self.folder} has no split {name!r}, only {', '.join(self.splits)}{hint}")
        return self.splits[name]

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer; raises UsageError where its file is not the one that made the tokens."""
        content = self.tokenizer_file.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.tokenizer_digest:
            raise UsageError(f"{self.tokenizer_file} changed since the corpus was built: build the corpus again")
        return tokenizers.deserialize(content, str(self.tokenizer_file))


def verify(folder: str | os.PathLike, progress: Progress | None = None) -> int:
    """The bytes read, after the sha256 of every file agreed; raises UsageError that names the first that does not."""
    corpus = Corpus(folder)
    tokens = corpus.manifest["shards"]
    entries = [corpus.manifest["tokenizer"], *tokens, *(entry["starts"] for entry in tokens)]
    done, total = 0, sum(entry["bytes"] for entry in entries)
    for entry in entries:
        name = corpus.folder / entry["file"]
        with open(name, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                raise UsageError(f"{name} changed since it was written (sha256 differs): build the corpus again")
        done += entry["bytes"]
        if progress:
            progress("verifying", done, total)
    return done


def is_built(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a finished corpus."""
    return (pathlib.Path(folder) / MANIFEST).exists()


def build(
    source: str,
    tokenizer: str | tokenizers.Tokenizer,
    out: str | os.PathLike,
    *,
    validation: float | None = None,
    validation_source: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus at `out`, tokenised from `source` unless it is there already with the same settings.

    `tokenizer` is one, or its file, or "KIND[:VOCAB_SIZE]" to train it here: byte, char, word and folded on all the
    text, bpe and unigram on the training split. `validation` is the share of the documents, taken from the
    end, or of the characters where there is one document; without it and `validation_source`, a source with a
    division of its own (python) keeps it. Documents end with the tokenizer's `eos_id`, where it has one.
    The folder appears whole: a killed build leaves nothing at `out` and starts over. Raises UsageError for
    an empty source, and for an `out` that holds anything else.
    """
    if validation is not None and validation_source is not None:
        raise UsageError("give --validation or --validation_source, not both")
    if validation is not None and not 0 <= validation < 1:
        raise UsageError(f"validation={validation} must be a share from 0 to below 1")
    if not files.is_local(out):
        raise UsageError(f"out={out} must be a local path: shards are mapped into memory")
    settings = _settings(source, tokenizer, validation, validation_source, shard_tokens)
    if validation is None and validation_source is None and (division := sources.held_out(source)):
        source, validation_source = division
    out = pathlib.Path(out)
    if not is_built(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _building(out) as folder:
            if folder is not None:
                parts = _Parts(source, validation or 0.0, validation_source, progress or (lambda *_: None))
                manifest = _write(folder, parts, _resolve_tokenizer(tokenizer, parts), shard_tokens)
                files.write_json(folder / MANIFEST, _sealed(manifest | {"settings": settings}))
    corpus = Corpus(out)
    _check_same(corpus, settings)
    return corpus


class _Parts:
    """The documents of a build by split, after one pass that counts them."""

    def __init__(self, source: str, validation: float, validation_source: str | None, progress: Progress):
        self.source, self.validation_source, self.progress = source, validation_source, progress
        self.characters = 0
        documents = self._count(source)
        if not documents:
            raise UsageError(f"source {source} holds no text")
        self.single_cut = int(self.characters * (1 - validation)) if validation and documents == 1 else None
        if self.single_cut == 0:
            raise UsageError(f"source {source} has {self.characters} characters, too few to take validation from")
        self.last_train = max(1, int(documents * (1 - validation)))
        if validation_source and not self._count(validation_source):
            raise UsageError(f"validation_source {validation_source} holds no text")
        self.counts: sources.Counts = sources.Counts()

    def _count(self, source: str) -> int:
        documents, shown = 0, self.characters
        self.progress("reading", shown, 0)
        for text in sources.documents(source):
            documents += 1
            self.characters += len(text)
            if self.characters - shown > _BATCH_CHARACTERS:
                shown = self.characters
                self.progress("reading", shown, 0)
        return documents

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(split, document) for each."""
        self.counts.clear()
        for i, text in enumerate(sources.documents(self.source, self.counts)):
            if self.single_cut is not None:
                yield "train", text[: self.single_cut]
                yield "validation", text[self.single_cut :]
            else:
                yield ("train" if i < self.last_train else "validation"), text
        if self.validation_source:
            for text in sources.documents(self.validation_source, self.counts):
                yield "validation", text


def _resolve_tokenizer(tokenizer: str | tokenizers.Tokenizer, parts: _Parts) -> tokenizers.Tokenizer:
    if not isinstance(tokenizer, str):
        return tokenizer
    if not _is_kind(tokenizer):
        return tokenizers.load(tokenizer)
    kind, size = tokenizers.parse(tokenizer)
    parts.progress("training the tokenizer", 0, 0)
    sees_all = kind in ("char", "word", "folded")
    return tokenizers.train(kind, (text for split, text in parts if sees_all or split == "train"), size)


def _is_kind(tokenizer: str) -> bool:
    return tokenizer.partition(":")[0] in tokenizers.KINDS


def _write(folder: pathlib.Path, parts: _Parts, tokenizer: tokenizers.Tokenizer, shard_tokens: int) -> dict[str, Any]:
    """The manifest, without settings, of all the files written."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers: dict[str, shards.Writer] = {}
    done = 0
    for batch in _batches(parts):
        encoded = tokenizer.encode_batch([block for _, block, _ in batch])
        for (split, block, is_last), ids in zip(batch, encoded, strict=True):
            if split not in writers:
                writers[split] = shards.Writer(folder, split, dtype, shard_tokens)
            writers[split].add(ids, len(block.encode()))
            if is_last:
                writers[split].end_document(tokenizer.eos_id)
            done += len(block)
        parts.progress("tokenising", done, parts.characters)
    written = [entry for writer in writers.values() for entry in writer.close()]
    content = tokenizer.serialize()
    files.write_bytes(folder / tokenizer.file_name, content)
    return {
        "version": VERSION,
        "dtype": np.dtype(dtype).name,
        "tokenizer": {
            "file": tokenizer.file_name,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "splits": {name: writer.totals for name, writer in writers.items()},
        "shards": written,
        "cleaning": {name: count for name, count in parts.counts.items() if count},
    }


def _batches(parts: _Parts) -> Iterator[list[tuple[str, str, bool]]]:
    """Lists of (split, block of a document, whether it is the document's last)."""
    batch, characters = [], 0
    for split, text in parts:
        cut = list(clean.blocks(text, _BATCH_CHARACTERS))
        for i, block in enumerate(cut):
            batch.append((split, block, i == len(cut) - 1))
            characters += len(block)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _settings(
    source: str,
    tokenizer: str | tokenizers.Tokenizer,
    validation: float | None,
    validation_source: str | None,
    shard_tokens: int,
) -> dict[str, Any]:
    """What decides the content of a corpus: a finished one with others is not the one asked for."""
    if not isinstance(tokenizer, str):
        tokenizer = f"sha256:{tokenizer.digest}"
    elif _is_kind(tokenizer):
        tokenizers.parse(tokenizer)
    else:
        tokenizer = f"sha256:{tokenizers.load(tokenizer).digest}"
    return {
        "source": source,
        "source_size": sources.size(source),
        "tokenizer": tokenizer,
        "validation": validation,
        "validation_source": validation_source,
        "validation_source_size": sources.size(validation_source) if validation_source else {},
        "shard_tokens": shard_tokens,
        "python": platform.python_version() if source.startswith("python") else None,
        "version": VERSION,
    }


def _check_same(corpus: Corpus, settings: dict[str, Any]) -> None:
    old = corpus.manifest.get("settings", {})
    for name, value in settings.items():
        if old.get(name) != value:
            raise UsageError(
                f"{corpus.folder} was built with {name}={old.get(name)!r}, not {value!r}: "
                "give another --out, or delete that folder"
            )


@contextlib.contextmanager
def _building(out: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A fresh folder that becomes `out` at the end, or None where `out` is a corpus already.

    Builders of the same corpus wait for each other; a lock dies with its process, and what a killed build
    left is removed.
    """
    temporary = out.with_name(out.name + ".building")
    descriptor = _lock(temporary)
    try:
        if is_built(out):
            shutil.rmtree(temporary)
            yield None
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and is not a corpus: give another --out, or delete it")
        for left in temporary.iterdir():
            left.unlink()
        yield temporary
        files.fsync_folder(temporary)
        os.rename(temporary, out)
        files.fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _lock(folder: pathlib.Path) -> int:
    """An open, locked descriptor of the folder, which is made where it is missing."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The builder before us may have renamed or removed the folder that we waited for.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        os.close(descriptor)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
            raise unknown(f"corpus folder in {folder.parent}", folder.name, near)
        raise UsageError(f"{folder} is not a corpus: it has no {MANIFEST}; build one with lm corpus --out={folder}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): build the corpus again") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UsageError(f"{path} is not of version {VERSION}, which this code reads: build the corpus again")
    if _sealed(manifest) != manifest:
        raise UsageError(f"{path} changed since it was written (sha256 differs): build the corpus again")
    return manifest


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with "sha256" over all else, so that a flipped digit in it is noticed too."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}
