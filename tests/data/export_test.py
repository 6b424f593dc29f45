"""transformers reads our tokenizers with the same ids and the same text."""

import json

import pytest

from lm.data import export, sources, tokenizers
from lm.data.pretrained import Pretrained

pytestmark = pytest.mark.hf
transformers = pytest.importorskip("transformers")

AWKWARD = [
    "",
    " ",
    "\n\n \n",
    "tab\tand\0nul and\r\nCRLF\r \x1c\x1f x",
    "  leading and trailing   ",
    "<pad><0x0A> <0xZZ> \u2581\u2581x\u2581",
    "😀👩‍👩‍👧 漢字 ñ\u0301 ﬁ ａ \ufeff\ufffd\u00a0\u2028\u3000",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def library():
    return list(sources.documents("python"))


@pytest.mark.parametrize("kind", ["byte", "char", "char:500", "word", "word:1000", "bpe:2000", "unigram:600"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_ids_and_text_are_equal(tmp_path, library, kind, model_type):
    name, size = tokenizers.parse(kind)
    texts = library[5::25] + AWKWARD
    ours = tokenizers.train(name, texts if size is None else library[::10], size)
    extra = ["[MASK]", "<extra_id_0>"]
    (tmp_path / "tokenizer.json").write_bytes(export.tokenizer_json(ours, extra))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(export.tokenizer_config(ours, extra)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts if model_type == "llama" else texts[-12:]:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text[:200]
        if name != "word" and name + str(size) != "char500":
            assert theirs.decode(ids) == text
        elif size is None:
            assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == ours.vocab_size + 1
    assert theirs.mask_token_id == ours.vocab_size


def test_what_was_read_is_written_again():
    content = export.tokenizer_json(tokenizers.Byte())
    assert export.tokenizer_json(Pretrained(content)) == content
