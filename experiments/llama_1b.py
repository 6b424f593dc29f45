"""Llama 3.2 1B's architecture (Meta 2024), trained from scratch.

16 layers, 2,048 wide, 32 heads over 8 of keys and values, SwiGLU of 8,192, rotary base 500,000, tied output.
Rates have the shape of Llama 3's (Grattafiori et al. 2024, arXiv 2407.21783, section 3.4: AdamW, linear warm-up,
cosine to a hundredth of the peak) and the 8B model's peak; the 1B model's own, pruned from it, are not published.
Rotary frequencies are not scaled for lengths beyond the 8,192 tokens trained here.
Command: lm train --experiment=llama_1b --corpus=DIR --workdir=DIR
(1,236M parameters with its 128,256-token vocabulary.)
Hardware: 8 GPUs with 80 GB, or 16 TPU v5p chips.
"""

from lm.data.stream import Data
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.train.optimizers import AdamW
from lm.train.run import Evals, Run, Train
from lm.train.schedules import Cosine


def run() -> Run:
    """4M tokens a step, 100B tokens in all."""
    return Run(
        model=Decoder(
            layers=16,
            width=2048,
            heads=32,
            kv_heads=8,
            head_dim=64,
            mlp_width=8192,
            positions="rotary",
            rope_base=500_000.0,
            norm="rmsnorm",
            norm_bias=False,
            activation="silu",
            gated=True,
            attention_bias=False,
            mlp_bias=False,
            init="normal",
            dtype="bfloat16",
            remat="attention",
        ),
        objective=Causal(isolate_documents=True),
        data=Data(tokenizer="bpe:128256"),  # As published; a corpus brings its own.
        optimizer=AdamW(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        schedule=Cosine(peak=3e-4, final=3e-6, warmup_steps=2000),
        mesh=Mesh(fsdp=8),
        train=Train(
            steps=25_000,
            batch_size=512,
            seq_len=8192,
            accumulate=16,
            eval_every=1000,
            save_every=500,
            keep_every=5000,
        ),
        evals=Evals(batch_size=64, max_tokens=10_000_000),
    )
