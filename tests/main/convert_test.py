"""lm convert, both ways."""

import jax
import numpy as np
import pytest

import lm
from lm.core import params, tree
from lm.models.decoder import Decoder
from tests.main.helpers import TINY, call

MODEL = Decoder(
    layers=2,
    width=16,
    heads=2,
    vocab_size=300,
    positions="rotary",
    norm="rmsnorm",
    norm_bias=False,
    activation="silu",
    gated=True,
    attention_bias=False,
    mlp_bias=False,
    tied=False,
    init="normal",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mistral folder, which Llama's class would compute too, with a byte-level tokenizer.json."""
    out = tmp_path_factory.mktemp("hf")
    lm.interop.save(out, MODEL, params.initialize(MODEL.spec(), jax.random.key(0)), architecture="MistralForCausalLM")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    return out


def test_there_and_back_gives_the_same_files(folder, tmp_path, capfd):
    run, back = tmp_path / "run", tmp_path / "back"
    assert call("convert", f"--checkpoint={folder}", f"--out={run}") == 0
    assert call("convert", f"--checkpoint={run}", f"--out={back}") == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert "MistralForCausalLM" in capfd.readouterr().out


@pytest.mark.slow
def test_a_converted_run_generates_and_starts_another(folder, tmp_path, capfd):
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    assert call("convert", f"--checkpoint={folder}", f"--out={run}") == 0
    for checkpoint in (folder, run):
        assert call("generate", f"--checkpoint={checkpoint}", "--prompt=the cat é", "--tokens=5") == 0
    texts = [line for line in capfd.readouterr().out.splitlines() if line.startswith("the cat é")]
    assert len(texts) == 2 and texts[0] == texts[1]
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    source = f"--source=text:{tmp_path / 'text.txt'}"
    assert call("corpus", source, f"--tokenizer={folder / 'tokenizer.json'}", f"--out={corpus}") == 0
    for checkpoint in (folder, run):
        assert (
            call("evaluate", f"--checkpoint={checkpoint}", f"--corpus={corpus}", "--split=train", "--seq_len=64") == 0
        )
    figures = [line for line in capfd.readouterr().out.splitlines() if line.startswith("loss: ")]
    assert len(figures) == 2 and figures[0] == figures[1]
    (tmp_path / "more.py").write_text(
        "from lm.interop.load import load_run\nfrom lm.train.run import Run\n\n"
        f"def run() -> Run:\n    return load_run({str(run)!r})\n"
    )
    arguments = (f"--experiment={tmp_path / 'more.py'}", f"--corpus={corpus}", "--set=train.steps=1")
    arguments += ("--set=train.seq_len=32", "--set=schedule.peak=1e-30")
    before = tree.flatten(lm.load(folder)[1])
    for i, checkpoint in enumerate((folder, run)):
        assert call("train", *arguments, f"--workdir={tmp_path / str(i)}", f"--init_from={checkpoint}") == 0
        model, weights = lm.load(tmp_path / str(i))
        assert model.width == 16 and model.vocab_size == 300
        assert all(np.array_equal(x, before[path]) for path, x in tree.flatten(weights).items())
    capfd.readouterr()
    other = (*arguments, f"--workdir={tmp_path / 'other'}", f"--init_from={folder}", "--set=model.width=32")
    assert call("train", *other) == 2
    assert "embed/table of shape (300, 16), and the run's model of (300, 32)" in capfd.readouterr().err


def test_a_run_of_ours_becomes_a_folder_or_says_why_not(tmp_path, capfd):
    assert call("train", f"--experiment={TINY}", f"--workdir={tmp_path / 'run'}", "--set=train.steps=2") == 0
    arguments = (f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}")
    assert call("convert", *arguments, "--architecture=LlamaForCausalLM") == 2
    assert "no class of Hugging Face's (LlamaForCausalLM looked at)" in capfd.readouterr().err
    assert call("convert", *arguments) == 0
    assert lm.load(tmp_path / "hf")[0].activation == "gelu"


def test_a_tokenizer_of_ours_goes_along_with_the_ids_that_the_objective_added(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "llama.py").write_text(
        "import dataclasses\n\nfrom lm.data.stream import Data\nfrom lm.models.decoder import Decoder\n"
        "from lm.objectives.fim import FillInTheMiddle\nfrom tests.main import tiny\n\n\ndef run():\n"
        "    model = Decoder(layers=1, heads=2, width=16, positions='rotary', norm='rmsnorm', norm_bias=False,\n"
        "                    activation='silu', gated=True, attention_bias=False, mlp_bias=False)\n"
        "    data = Data(source='text:" + str(tmp_path / "text.txt") + "', tokenizer='bpe:300', validation=0.1)\n"
        "    return dataclasses.replace(tiny.run(), model=model, objective=FillInTheMiddle(), data=data)\n"
    )
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and then it sat again.\n" * 400)
    run = f"--workdir={tmp_path / 'run'}"
    assert call("train", f"--experiment={tmp_path / 'llama.py'}", run, "--set=train.steps=2") == 0
    assert call("convert", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = lm.load_tokenizer(tmp_path / "run")
    text = "  the cat é \u2581 sat\n"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist() and theirs.decode(ours.encode(text)) == text
    assert theirs.convert_tokens_to_ids(["[PRE]", "[EOT]"]) == [300, 303] and theirs.eos_token_id == ours.eos_id
    assert lm.load_tokenizer(tmp_path / "hf").encode(text).tolist() == ours.encode(text).tolist()
