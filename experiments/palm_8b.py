"""PaLM 8B (Chowdhery et al. 2022, arXiv 2204.02311, sections 2 and 5).

Parallel attention and SwiGLU on one norm, 16 query heads of 256 over one head of keys and values, rotary positions,
no biases, tied output with logits over the square root of the width, unfactored Adafactor with b1 = 0.9, a rate of
1e-2 for 10,000 steps and one over the root of the step from there, z-loss of 1e-4, 2,048 tokens.
Departures: the batch is 512 sequences throughout, and weight decay, there the square of the learning rate, is off.
Command: lm train --experiment=palm_8b --corpus=DIR --workdir=DIR   (8.6B parameters with its 256,000-token vocabulary)
Hardware: the paper used TPU v4 pods; 64 chips with 95 GB hold it.
"""

from lm.data.stream import Data
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.train.optimizers import Adafactor
from lm.train.run import Evals, Run, Train
from lm.train.schedules import InverseSqrt


def run() -> Run:
    """32 layers, 4,096 wide."""
    return Run(
        model=Decoder(
            layers=32,
            width=4096,
            heads=16,
            kv_heads=1,
            head_dim=256,
            mlp_width=16_384,
            positions="rotary",
            rope_style="interleaved",
            norm_bias=False,
            block="parallel",
            activation="silu",
            gated=True,
            attention_bias=False,
            mlp_bias=False,
            logit_scale=4096**-0.5,
            init="fan_in",
            init_std=1.0,
            dtype="bfloat16",
            remat="attention",
        ),
        objective=Causal(z_loss=1e-4),
        data=Data(tokenizer="bpe:256000"),  # As published; a corpus brings its own.
        optimizer=Adafactor(decay_rate=0.8, factored=False, momentum=0.9, clip_norm=1.0),
        schedule=InverseSqrt(peak=1e-2, warmup_steps=10_000, hold=True),
        mesh=Mesh(fsdp=64),
        train=Train(steps=250_000, batch_size=512, seq_len=2048, eval_every=1000, save_every=1000, keep_every=25_000),
        evals=Evals(batch_size=256, max_tokens=10_000_000),
    )
