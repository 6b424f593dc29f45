"""Folders of tokenizer files give the ids that transformers gives, and text it can be given back as."""

import io
import json

import pytest

from lm.core.errors import UsageError
from lm.data import huggingface, sources, tokenizers

pytestmark = pytest.mark.hf
transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("tokenizers")

ODD = [
    "",
    " ",
    "Hello World, it's me!",
    "  two  spaces   inside ",
    "lines\n\nand\ttabs\r\n",
    "Ünïcödé ﬁ ａ １２ ½ ﷺ",
    "漢字かな 😀👩‍👩‍👧 \u00a0x\u3000y",
    "``quoted'' 1,000 , 5,",
    "<s> </s> <pad> <mask> <unk> [MASK] [SEP] <extra_id_0> <extra_id_99> <eop>",
    "\u2581odd \u2581\u2581marks",
    "a<extra_id_3>b </s>c",
    "x" * 300,
]


@pytest.fixture(scope="module")
def texts():
    return [text[:3000] for text in list(sources.documents("python"))[:200:10]]


def pieces(folder, name, texts, kind="unigram", size=400, **settings):
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=size, minloglevel=2, **settings
    )
    (folder / name).write_bytes(model.getvalue())


def byte_level(folder, texts, special):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(folder))


def word_piece(folder, texts, lower=True):
    tokenizer = hf.BertWordPieceTokenizer(lowercase=lower)
    tokenizer.train_from_iterator(texts, vocab_size=500, show_progress=False)
    tokenizer.save_model(str(folder))


def make(folder, family, texts):
    """The files of one family in `folder`; returns the class that reads them and whether text comes back whole."""
    config = {}
    if family in ("gpt2", "roberta", "bart"):
        special = ["<|endoftext|>"] if family == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>"]
        byte_level(folder, texts, special)
        config = (
            {"mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "special": True}}
            if family == "roberta"
            else {}
        )
    elif family.startswith("bert"):
        word_piece(folder, texts, lower=family == "bert")
        config = {"do_lower_case": False} if family == "bert_cased" else {}
    elif family == "openai-gpt":
        tokenizer = hf.Tokenizer(hf.models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
        tokenizer.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.model.save(str(folder))
    elif family in ("t5", "t5_few"):
        pieces(folder, "spiece.model", texts, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        config = {"extra_ids": 7} if family == "t5_few" else {}
    elif family == "albert":
        control = ["[CLS]", "[SEP]", "[MASK]"]
        pieces(folder, "spiece.model", texts, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=control)
    elif family == "xlnet":
        control = ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]
        pieces(folder, "spiece.model", texts, unk_id=0, bos_id=1, eos_id=2, control_symbols=control)
    elif family == "xlm-roberta":
        pieces(folder, "sentencepiece.bpe.model", texts, unk_id=0, bos_id=1, eos_id=2)
    elif family in ("llama", "llama_legacy"):
        settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
        pieces(folder, "tokenizer.model", texts, "bpe", 700, **settings)
        config = {"legacy": True} if family == "llama_legacy" else {}
    name = {"bert_cased": "bert", "t5_few": "t5", "llama_legacy": "llama"}.get(family, family)
    classes = {
        "gpt2": "GPT2Tokenizer",
        "roberta": "RobertaTokenizer",
        "bart": "BartTokenizer",
        "bert": "BertTokenizer",
        "openai-gpt": "OpenAIGPTTokenizer",
        "t5": "T5Tokenizer",
        "albert": "AlbertTokenizer",
        "xlnet": "XLNetTokenizer",
        "xlm-roberta": "XLMRobertaTokenizer",
        "llama": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": classes[name]}))
    (folder / "config.json").write_text(json.dumps({"model_type": name}))


FAMILIES = (
    *("gpt2", "roberta", "bart", "bert", "bert_cased", "openai-gpt"),
    *("t5", "t5_few", "albert", "xlnet", "xlm-roberta", "llama", "llama_legacy"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_text_are_those_of_transformers(tmp_path, texts, family):
    make(tmp_path, family, texts)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizers.load(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in [*texts, *ODD]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
    assert ours.pieces == theirs.convert_ids_to_tokens(range(len(theirs)))
    assert tokenizers.deserialize(ours.serialize()).encode(texts[0]).tolist() == ours.encode(texts[0]).tolist()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("settings", [{}, {"byte_fallback": True, "add_dummy_prefix": False}])
def test_a_class_without_rules_of_its_own_follows_the_model(tmp_path, texts, kind, settings):
    pieces(tmp_path, "tokenizer.model", texts, kind, 700, user_defined_symbols=["<sep>", "=="], **settings)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "umt5"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizers.load(tmp_path)
    for text in [*texts, *ODD]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text


def test_special_tokens_that_the_vocabulary_lacks_get_the_next_ids(tmp_path, texts):
    make(tmp_path, "gpt2", texts)
    config = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]}
    config["added_tokens_decoder"] = {"500": {"content": "<b>", "special": True, "lstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizers.load(tmp_path)
    text = "x <a>y <b> z<pad><|endoftext|>"
    assert ours.encode(text).tolist() == theirs(text)["input_ids"] and ours.vocab_size == len(theirs) == 503
    assert ours.special("<pad>") == theirs.pad_token_id and ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("lowercase", [False, True])
def test_trained_word_pieces_are_read_by_transformers(tmp_path, texts, lowercase):
    ours = tokenizers.train("wordpiece", texts, 400, lowercase=lowercase)
    assert ours.kind == "wordpiece" and ours.vocab_size == 400
    assert ours.digest == tokenizers.train("wordpiece", texts, 400, lowercase=lowercase).digest
    assert ours.pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and ours.eos_id == 3
    ours.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*texts, *ODD]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
    ids = theirs("Hello world")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3) and tokenizers.load(tmp_path).digest == ours.digest
    assert ours.decode(ours.encode("Import  the file.")) == ("import the file." if lowercase else "Import the file.")
    assert ours.encode("a\ud800b").tolist() == ours.encode("a\ufffdb").tolist()


def test_word_pieces_go_into_a_bert_folder(tmp_path, texts):
    ours = tokenizers.train("wordpiece", texts, 400)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(t)["input_ids"][1:-1] for t in texts] == [ours.encode(t).tolist() for t in texts]
    assert theirs.mask_token_id == ours.special("[MASK]") == 4


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no tokenizer\.json, vocab\.json and merges\.txt, vocab\.txt"):
        tokenizers.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    assert huggingface.found(tmp_path) is None
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UsageError, match="'clip'.*bart, gpt2, openaigpt, roberta"):
        tokenizers.load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(UsageError, match="no SentencePiece model"):
        tokenizers.load(tmp_path)
    with pytest.raises(UsageError, match="vocab_size=20"):
        tokenizers.train("wordpiece", ["abcdefghijklmnopqrstuvwxyz"], 20)
    with pytest.raises(UsageError, match="lowercase"):
        tokenizers.train("bpe", ["abc"], 300, lowercase=True)
