"""The formulas beside published runs: each row's model, hardware and batch, and the tokens a second of one chip."""

import dataclasses

import pytest

from experiments import gpt2_124m, gpt2_xl, llama_8b, llama_70b, llama_405b
from lm.parallel.mesh import Mesh
from lm.plan import hardware, program
from lm.plan.roofline import SPREAD, roofline

LLAMA_7B = {"layers": 32, "heads": 32, "kv_heads": 32, "mlp_width": 11008, "vocab_size": 32000}
# (recipe, its model's settings, hardware, mesh, rows, tokens a row, tokens/s a chip). Rows, policies and rates of TPUs:
# AI-Hypercomputer/tpu-recipes, training/{trillium,v5p,ironwood}; of GPUs: NVIDIA/JAX-Toolbox (MaxText), gpu-recipes
# (a3ultra, MaxText), llm.c's log in KellerJordan/modded-nanogpt, and nanoGPT on one H200.
ROWS = {
    "70B, v6e-32": (llama_70b, {}, "v6e:4x8", Mesh(fsdp=32), 64, 8192, 921.0),
    "70B, v6e-64": (llama_70b, {}, "v6e:8x8", Mesh(fsdp=64), 128, 8192, 876.7),
    "70B, v6e-128": (llama_70b, {}, "v6e:8x16", Mesh(fsdp=128), 512, 8192, 942.0),
    "70B, v6e-256": (llama_70b, {}, "v6e:16x16", Mesh(fsdp=256), 1280, 8192, 960.2),
    "8B, v6e-8": (llama_8b, {"remat": "full"}, "v6e:2x4", Mesh(fsdp=8), 24, 8192, 7139.0),
    "405B, v5p-1024": (llama_405b, {}, "v5p:8x8x8", Mesh(fsdp=512), 1024, 8192, 124.6),
    "70B, tpu7x-64": (llama_70b, {"remat": "attention"}, "tpu7x:4x4x4", Mesh(fsdp=128), 256, 8192, 2687.0),
    "70B, tpu7x-256": (llama_70b, {"remat": "attention"}, "tpu7x:4x8x8", Mesh(fsdp=512), 1024, 8192, 2670.6),
    "70B at 131,072, tpu7x-256": (
        llama_70b,
        {"remat": "attention"},
        "tpu7x:4x8x8",
        Mesh(fsdp=64, seq=8),
        64,
        131_072,
        963.0,
    ),
    "405B, tpu7x-256": (llama_405b, {"remat": "attention"}, "tpu7x:4x8x8", Mesh(fsdp=512), 1536, 8192, 499.8),
    "Llama 2 7B, 8 H100": (llama_8b, LLAMA_7B, "h100:8", Mesh(fsdp=8), 16, 4096, 11361.0),
    "70B, 256 H200": (llama_70b, {}, "h200:256", Mesh(fsdp=256), 512, 8192, 1056.0),
    "GPT-2 124M, 8 H100": (gpt2_124m, {"vocab_size": 50304, "remat": "none"}, "h100:8", Mesh(), 512, 1024, 475_000.0),
    "GPT-2 XL, H200": (gpt2_xl, {"vocab_size": 50304, "remat": "none"}, "h200:1", Mesh(), 8, 1024, 49_900.0),
}


def predicted(recipe, settings, name, mesh, rows, length):
    run = recipe.run()
    model = dataclasses.replace(run.model, **settings)
    train = dataclasses.replace(run.train, batch_size=rows, seq_len=length, accumulate=1)
    run = dataclasses.replace(run, model=model, mesh=mesh, train=train)
    wanted = hardware.parse(name)
    line = roofline(run, wanted, mesh.sizes(wanted.devices), program.batch_shapes(run))
    return line.tokens_per_second / line.chips


@pytest.mark.parametrize("row", ROWS)
def test_the_plan_is_near_a_published_run(row):
    *setup, published = ROWS[row]
    assert abs(predicted(*setup) / published - 1) <= SPREAD
