"""The configs of well-known checkpoints, as they were published (hub_configs.json), are read, and written back.

They hold what configs made by today's transformers do not: old spellings, settings of tools long gone.
"""

import json
import pathlib

import pytest

from lm.core import params, tree
from lm.interop import hf
from lm.interop.fields import Fields

SINUSOIDS = ("embed_positions.weight",)
CONFIGS = json.loads((pathlib.Path(__file__).parent / "hub_configs.json").read_text())


def read(config):
    architecture = config["architectures"][0]
    fields = Fields(config, "config.json")
    model = hf.architectures()[architecture].read(fields, architecture)
    fields.finish()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_read_and_what_is_written_says_the_same(name):
    architecture, model = CONFIGS[name]["architectures"][0], read(CONFIGS[name])
    written = hf.express(model, architecture)[2]
    family = hf.architectures()[architecture]
    assert family.numbers(read(json.loads(json.dumps(written)))) == family.numbers(model)


@pytest.mark.hf
@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_has_as_many_parameters_as_transformers_makes_of_it(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    cls = getattr(transformers, CONFIGS[name]["architectures"][0])
    fixed = name in ("opus-mt-en-de", "wmt19-en-de")
    with torch.device("meta"):
        module = cls(cls.config_class.from_pretrained(tmp_path))
        module.tie_weights()
    # Sinusoids are parameters there, under names of their own; biases that are never trained are buffers.
    expected = sum(p.numel() for path, p in module.named_parameters() if not (path.endswith(SINUSOIDS) and fixed))
    if name in ("t5-v1_1-small", "mt5-small"):
        # transformers 5 ties the head of these whatever their config says; in their files it is apart.
        expected += CONFIGS[name]["vocab_size"] * CONFIGS[name]["d_model"]
    spec = read(CONFIGS[name]).spec()
    assert params.count([p for p in tree.flatten(spec).values() if p.trainable]) == expected
