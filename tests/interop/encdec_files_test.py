"""Folders of encoder-decoders: what old configs say, several names of one tensor, meshes, and refusals."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import lm
from lm.core.errors import UsageError
from lm.interop import hf, safetensors
from lm.interop.fields import Fields
from lm.layers.buckets import Buckets
from lm.parallel import rules
from tests.main.helpers import call
from tests.models.contract_test import randomized
from tests.models.encdec_test import MODELS

# As the Hub has them: t5-small, google/t5-v1_1-small, google/umt5-small, bart-base, opus-mt-en-de, wmt19-ru-en.
SIDES = {
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "num_hidden_layers": 6,
    "d_model": 512,
    "dropout": 0.1,
    "init_std": 0.02,
    "is_encoder_decoder": True,
}
T5 = {"d_ff": 2048, "d_kv": 64, "d_model": 512, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
HUB = {
    "T5ForConditionalGeneration": T5
    | {"n_positions": 512, "output_past": True, "relative_attention_num_buckets": 32, "task_specific_params": {}},
    "T5ForConditionalGeneration 1.1": T5
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 8},
    "UMT5ForConditionalGeneration": T5
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scalable_attention": True}
    | {"is_gated_act": True, "dense_act_fn": "gelu_new", "classifier_dropout": 0.0},
    "BartForConditionalGeneration": SIDES
    | {"add_bias_logits": False, "add_final_layer_norm": False, "normalize_before": False, "classif_dropout": 0.1}
    | {"normalize_embedding": True, "scale_embedding": False, "gradient_checkpointing": False, "num_beams": 4}
    | {"max_position_embeddings": 1024, "vocab_size": 50265, "force_bos_token_to_be_generated": False},
    "MarianMTModel": SIDES
    | {"activation_function": "swish", "bad_words_ids": [[58100]], "static_position_embeddings": True}
    | {"normalize_embedding": False, "scale_embedding": True, "pad_token_id": 58100, "vocab_size": 58101}
    | {"extra_pos_embeddings": 58101, "max_position_embeddings": 512, "num_beams": 6},
    "FSMTForConditionalGeneration": SIDES
    | {"langs": ["ru", "en"], "src_vocab_size": 31232, "tgt_vocab_size": 31640, "decoder": {"vocab_size": 31640}}
    | {"tie_word_embeddings": False, "early_stopping": False, "length_penalty": 1.1, "activation_function": "relu"},
}
WHOLE = {"valid_vocab_size": None}
FOLDERS = {
    "T5ForConditionalGeneration": dataclasses.replace(MODELS["t5"], **WHOLE),
    "UMT5ForConditionalGeneration": dataclasses.replace(MODELS["umt5"], decoder_heads=None, **WHOLE),
    "BartForConditionalGeneration": dataclasses.replace(MODELS["bart"], tied=False, **WHOLE),
    "MarianMTModel": dataclasses.replace(MODELS["marian_split"], **WHOLE),
    "FSMTForConditionalGeneration": dataclasses.replace(MODELS["fsmt"], **WHOLE),
}


def read(name, **changes):
    architecture = name.split()[0]
    fields = Fields(HUB[name] | changes, "config.json")
    family = hf.architectures()[architecture]
    model = family.read(fields, architecture)
    fields.finish()
    return model


def test_configs_of_the_hub_are_read():
    small, newer, umt5, base, marian, fsmt = (read(name) for name in HUB)
    assert (small.buckets, small.logit_scale, small.tied, small.head_dim) == (Buckets(32, 128), 512**-0.5, True, 64)
    assert (newer.logit_scale, newer.tied, newer.activation, newer.gated) == (1.0, False, "gelu_tanh", True)
    assert newer.decoder_layers == 8 and newer.start_id == 0
    assert umt5.buckets == Buckets(32, 128, each_layer=True) and umt5.logit_scale == 1.0
    assert (base.max_len, base.position_offset, base.embed_scale, base.start_id) == (1024, 2, 1.0, 2)
    assert (marian.embed_scale, marian.start_id, marian.activation) == (512**0.5, 58100, "silu")
    assert (fsmt.source_vocab_size, fsmt.vocab_size, fsmt.position_offset, fsmt.tied) == (31232, 31640, 2, False)


@pytest.mark.parametrize(
    "name, change",
    [
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-quick_gelu"}),
        ("T5ForConditionalGeneration", {"dense_act_fn": "silu"}),
        ("T5ForConditionalGeneration", {"encoder_rotary": True}),
        ("BartForConditionalGeneration", {"normalize_before": True}),
        ("BartForConditionalGeneration", {"encoder_layerdrop": 0.1}),
        ("MarianMTModel", {"static_position_embeddings": False}),
        ("FSMTForConditionalGeneration", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_settings_that_would_change_the_numbers_are_refused_by_name(name, change):
    field = "src_vocab_size" if name.startswith("FSMT") else next(iter(change))
    with pytest.raises(UsageError, match=field):
        read(name, **change)


@pytest.mark.parametrize("architecture", FOLDERS)
def test_a_model_of_ours_is_written_read_on_a_mesh_and_converted_there_and_back(architecture, tmp_path):
    model, (hugging, run, back) = FOLDERS[architecture], (tmp_path / name for name in ("hf", "run", "back"))
    params = randomized(model, 0)
    assert lm.interop.save(hugging, model, params) == architecture
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    read, found = hf.load(hugging, mesh)
    assert hf.architectures()[architecture].numbers(read) == hf.architectures()[architecture].numbers(model)
    assert jax.tree.map(lambda x: x.sharding, found) == rules.shardings(model.spec(), mesh)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert call("convert", f"--checkpoint={hugging}", f"--out={run}") == 0
    assert call("convert", f"--checkpoint={run}", f"--out={back}") == 0
    for name in ("config.json", "model.safetensors"):
        assert (back / name).read_bytes() == (hugging / name).read_bytes()


def rewrite(folder, change):
    """The folder's tensors {name: array} after `change`, written again."""
    reader = safetensors.Reader(folder)
    arrays = change({name: np.array(reader.read(name)) for name in reader.shapes})
    safetensors.write(folder, arrays.items(), {name: x.shape for name, x in arrays.items()}, 10**9)


def test_a_table_may_have_several_names_but_one_value(tmp_path):
    model = FOLDERS["T5ForConditionalGeneration"]
    params = randomized(model, 0)
    lm.interop.save(tmp_path, model, params)
    copy = "encoder.embed_tokens.weight"
    rewrite(
        tmp_path, lambda arrays: arrays | {copy: arrays["shared.weight"], "lm_head.weight": arrays["shared.weight"]}
    )
    jax.tree.map(np.testing.assert_array_equal, lm.load(tmp_path)[1], params)
    rewrite(tmp_path, lambda arrays: {name: x for name, x in arrays.items() if name != "shared.weight"})
    jax.tree.map(np.testing.assert_array_equal, lm.load(tmp_path)[1], params)
    rewrite(tmp_path, lambda arrays: arrays | {"decoder.embed_tokens.weight": arrays[copy] + 1})
    with pytest.raises(UsageError, match="decoder.embed_tokens.weight.*differ"):
        lm.load(tmp_path)


def test_a_model_that_no_class_computes_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no class of Hugging Face's"):
        lm.interop.save(tmp_path / "odd", MODELS["umt5"], randomized(MODELS["umt5"], 0))


def test_forward_names_what_is_missing_and_checks_both_vocabularies():
    model = MODELS["marian_split"]
    params = randomized(model, 0)
    with pytest.raises(UsageError, match="decoder_input_ids is missing"):
        lm.interop.forward(model, params, input_ids=[[1, 2]])
    with pytest.raises(UsageError, match="input_ids go from 1 to 64"):
        lm.interop.forward(model, params, input_ids=[[1, 64]], decoder_input_ids=[[100]])
    assert lm.interop.forward(model, params, input_ids=[[1, 2]], decoder_input_ids=[[100]])["logits"].shape == (
        1,
        1,
        128,
    )


def test_a_table_of_positions_that_is_not_computed_is_refused(tmp_path):
    model, name = FOLDERS["FSMTForConditionalGeneration"], "model.decoder.embed_positions.weight"
    lm.interop.save(tmp_path, model, randomized(model, 0))
    rewrite(tmp_path, lambda arrays: arrays | {name: arrays[name][:7]})
    lm.load(tmp_path)
    rewrite(tmp_path, lambda arrays: arrays | {name: arrays[name] + 0.01})
    with pytest.raises(UsageError, match=name):
        lm.load(tmp_path)
