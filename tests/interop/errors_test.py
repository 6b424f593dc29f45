"""What is wrong with a folder is said in one line, and nothing of it is loaded."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lm
from lm.core import params, tree
from lm.core.errors import UsageError
from lm.generate.sample import generate
from lm.interop import hf, safetensors
from lm.interop.fields import Fields
from lm.layers.block import Layer
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder

MODEL = Decoder(layers=2, width=16, heads=2, vocab_size=11, max_len=8, activation="gelu_tanh")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GPT-2 folder of our own making, in shards, and its parameters."""
    folder = tmp_path_factory.mktemp("gpt2")
    weights = params.initialize(MODEL.spec(), jax.random.key(0))
    assert lm.interop.save(folder, MODEL, weights, shard_bytes=8000) == "GPT2LMHeadModel"
    return folder, weights


@pytest.fixture
def folder(made, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(made[0], tmp_path / "copy")


def change_config(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_folder_of_our_own_is_read_without_torch(made):
    model, weights = lm.load(made[0])
    assert model.stack == MODEL.stack and len(list(made[0].glob("*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, weights, made[1])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM, which is not supported: .*LlamaForCausalLM"),
        ({"n_layer": 3}, "lacks the tensor transformer.h.2"),
        ({"tie_word_embeddings": False}, "lacks the tensor lm_head.weight"),
        ({"n_layer": 1}, "has a tensor transformer.h.1"),
        ({"n_positions": 9}, "wpe.weight has shape .8, 16., and the config says .9, 16."),
        ({"attention_sinks": True}, "attention_sinks=True, which may change the numbers"),
        ({"activation_function": "mish"}, "activation_function='mish'"),
        ({"n_head": "remove"}, "has no 'n_head'"),
        ({"n_head": 3}, "no multiple of heads"),
        ({"n_layer": "3"}, "has a setting of which no GPT2LMHeadModel can be made"),
        ({"architectures": "MambaModel"}, "is of class MambaModel, which"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(folder, settings, words):
    change_config(folder, **settings)
    with pytest.raises(UsageError, match=words) as error:
        lm.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_cut_file_is_refused(folder, cut):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(UsageError, match="cut or damaged"):
        lm.load(folder)


def test_a_missing_shard_is_named(folder):
    first_shard(folder).unlink()
    with pytest.raises(UsageError, match="lacks the shard model-00001"):
        lm.load(folder)


def test_a_shard_outside_the_folder_is_refused(folder):
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UsageError, match="not a file of its folder"):
        lm.load(folder)


def test_a_pickle_is_refused_with_the_way_to_convert_it(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="save_pretrained"):
        lm.load(folder)


@pytest.mark.parametrize("name, kind", [("BF16", safetensors._DTYPES["BF16"]), ("F16", np.dtype(np.float16))])
def test_half_precision_is_widened(made, folder, name, kind):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    header, data = {}, b""
    for path, array in hf.named(MODEL, made[1], "GPT2LMHeadModel"):
        raw = array.astype(kind).tobytes()
        header[path] = {"dtype": name, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / safetensors.FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = tree.flatten(lm.load(folder)[1])
    for path, array in tree.flatten(made[1]).items():
        np.testing.assert_array_equal(found[path], np.asarray(array).astype(kind).astype(np.float32))


def test_a_head_that_differs_is_the_models_own_whatever_the_config_says(made, folder):
    untied = Decoder(**{f: getattr(MODEL, f) for f in MODEL.__dataclass_fields__} | {"tied": False})
    weights = params.initialize(untied.spec(), jax.random.key(1))
    shutil.rmtree(folder)
    lm.interop.save(folder, untied, weights)
    change_config(folder, tie_word_embeddings=True)
    assert not lm.load(folder)[0].tied


def test_buffers_that_old_files_hold_are_passed_over(tmp_path):
    sizes = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 11, "tied": False, "init": "normal"}
    model = Decoder(**sizes, positions="rotary", rope_fraction=0.25, block="parallel_two_norms")
    weights = params.initialize(model.spec(), jax.random.key(0))
    assert lm.interop.save(tmp_path, model, weights) == "GPTNeoXForCausalLM"
    tensors = dict(hf.named(model, weights, "GPTNeoXForCausalLM"))
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        tensors[f"gpt_neox.layers.0.attention.{name}"] = np.ones(2, np.float32)
    safetensors.write(tmp_path, tensors.items(), {name: a.shape for name, a in tensors.items()}, 10**9)
    jax.tree.map(np.testing.assert_array_equal, lm.load(tmp_path)[1], weights)


def test_rows_for_no_token_are_left_out(tmp_path):
    padded = Decoder(layers=1, width=8, heads=1, vocab_size=16, valid_vocab_size=11, max_len=4)
    lm.interop.save(tmp_path, padded, params.initialize(padded.spec(), jax.random.key(0)))
    assert lm.load(tmp_path)[0].vocab_size == 11


def test_a_parametrization_that_multiplies_in_the_forward_pass_is_not_written(made, tmp_path):
    at_base = dataclasses.replace(MODEL, parametrization="mup", base_width=16)
    lm.interop.save(tmp_path, at_base, made[1])
    assert lm.load(tmp_path)[0].parametrization == "sp"
    with pytest.raises(UsageError, match="parametrization='mup' at width=16 .* multiplies in the forward pass"):
        lm.interop.save(tmp_path, dataclasses.replace(at_base, base_width=8), made[1])


def test_ids_outside_the_vocabulary_are_refused(made):
    with pytest.raises(UsageError, match="outside the vocabulary of 11"):
        lm.interop.forward(*lm.load(made[0]), input_ids=np.array([[3, 11]]))


@pytest.mark.parametrize(
    "name, ids, words",
    [
        ("token_type_ids", [[0, 2]], "token_type_ids go from 0 to 2, outside the types of 2"),
        ("position_ids", [[-1, 0]], "position_ids go from -1 to 0, outside the positions of 10"),
        ("position_ids", [[0, 10]], "outside the positions of 10"),
    ],
)
def test_types_and_positions_outside_their_tables_are_refused(name, ids, words):
    model = Encoder(layers=1, width=8, heads=1, vocab_size=11, max_len=8, position_offset=2)
    weights = params.initialize(model.spec(), jax.random.key(0))
    with pytest.raises(UsageError, match=words):
        lm.interop.forward(model, weights, input_ids=np.array([[3, 4]]), **{name: np.array(ids)})


NOT_COMPUTED = {
    "partial": {"rope_fraction": 0.5},
    "biased_window": {"attention_bias": True, "pattern": (Layer(window=4),)},
}


@pytest.mark.parametrize("name", NOT_COMPUTED)
def test_what_a_class_would_leave_out_is_not_written_as_that_class(name, tmp_path):
    sizes = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 11, "positions": "rotary", "init": "normal"}
    llama = {"norm": "rmsnorm", "norm_bias": False, "gated": True, "activation": "silu", "mlp_bias": False}
    model = Decoder(**{"attention_bias": False, "tied": False} | sizes | llama | NOT_COMPUTED[name])
    with pytest.raises(UsageError, match="no class of Hugging Face's"):
        lm.interop.save(tmp_path / "x", model, params.initialize(model.spec(), jax.random.key(0)))


def test_settings_that_a_class_ignores_are_refused_in_its_config():
    llama = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    for architecture, settings in (
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}),
        ("MistralForCausalLM", {"attention_bias": True}),
        ("Qwen3ForCausalLM", {"mlp_bias": True}),
    ):
        fields = Fields(llama | {"vocab_size": 9} | settings, "config.json")
        with pytest.raises(UsageError, match=next(iter(settings))):
            hf.architectures()[architecture].read(fields, architecture)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"attention_mask": np.ones((1, 5))}, r"attention_mask must be \(1, 3\), not \(1, 5\)"),
        ({"position_ids": np.arange(2)[None]}, r"position_ids must be \(1, 3\)"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids must hold whole numbers, not float64"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids is ragged"),
        ({"input_ids": np.zeros((0, 3), int)}, "input_ids are empty"),
    ],
)
def test_inputs_of_a_wrong_shape_or_kind_are_refused(made, inputs, words):
    with pytest.raises(UsageError, match=words):
        lm.interop.forward(*lm.load(made[0]), **{"input_ids": np.array([[1, 2, 3]])} | inputs)


def test_a_prompt_of_another_tokenizer_is_refused(made):
    with pytest.raises(UsageError, match="the id 33, outside the vocabulary of 11"):
        generate(*lm.load(made[0]), [[1, 33]], 2)


def test_a_bart_without_a_head_is_read_with_a_bias_of_zero(tmp_path):
    sizes = {"layers": 1, "width": 8, "heads": 2, "vocab_size": 11, "max_len": 6, "position_offset": 2, "start_id": 2}
    model = EncDec(**sizes, positions="learned", embed_norm=True, activation="gelu", head_bias=True)
    weights = params.initialize(model.spec(), jax.random.key(0))
    assert lm.interop.save(tmp_path, model, weights) == "BartForConditionalGeneration"
    tensors = dict(hf.named(model, weights, "BartForConditionalGeneration"))
    bare = {name.removeprefix("model."): a for name, a in tensors.items() if name.startswith("model.")}
    safetensors.write(tmp_path, bare.items(), {name: a.shape for name, a in bare.items()}, 10**9)
    change_config(tmp_path, architectures=["BartModel"])
    jax.tree.map(np.testing.assert_array_equal, lm.load(tmp_path)[1], weights)
