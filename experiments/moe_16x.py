"""A decoder of 16 experts of which a token passes 2: Mixtral (Jiang et al. 2024, 2401.04088) with twice the experts.

32 layers, 4,096 wide, 32 heads over 8 of keys and values, each expert a SwiGLU of 14,336: 92B parameters, 13B of them
active.
Command: lm train --experiment=moe_16x --corpus=DIR --workdir=DIR
Hardware: 512 TPU v5p chips; see lm plan --experiment=moe_16x --hardware=v5p:8x8x8.
"""

import dataclasses

from experiments import llama_8b
from lm.layers.block import Layer
from lm.layers.moe import Experts
from lm.train.run import Run


def run() -> Run:
    """4M tokens a step, 500B tokens in all; the mesh is the planner's, as the other Llamas' is."""
    base = llama_8b.run()
    layer = Layer(experts=Experts(count=16, chosen=2, balance=0.02))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, pattern=(layer,), remat="full", rope_base=1e6, vocab_size=32_000),
        train=dataclasses.replace(base.train, steps=120_000, batch_size=512),
    )
