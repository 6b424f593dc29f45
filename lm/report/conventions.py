"""How many parameters and how much work a model has, under each convention that papers count by."""

from typing import Any

from lm.core import params


def counts(model: Any, spec: Any) -> dict[str, float]:
    """{"params_trunk", "params_head", "params_embedding", "params_total", "params_active"}.

    trunk: the matrices between embedding and head, as often as a token passes them. head: what makes the logits, the
    table too where it is tied. embedding: tables that are looked up. total: each array once. active: without the
    experts that a token does not meet.
    """
    head = model.head(spec)
    head_matrices = params.count_passed(head, "matrix")
    vectors = params.count(spec, "vector")
    tables = params.count(spec, "embedding", "head")
    trunk = params.count_passed(spec, "matrix", "router") - head_matrices
    return {
        "params_trunk": trunk,
        "params_head": head_matrices + params.count(head, "embedding", "head"),
        "params_embedding": params.count(spec, "embedding"),
        "params_total": params.count(spec),
        "params_active": trunk + head_matrices + tables + vectors,
    }


def flops_per_token(model: Any, spec: Any, length: int) -> dict[str, float]:
    """{"flops_<convention>": forward and backward work a token}, those with attention for Transformers of one stack.

    kaplan (Kaplan et al. 2020, 2001.08361): 6 x trunk; kaplan_attention adds 6 L s d. head: 6 x (trunk + head), and
    head_causal with 6 L s d, head_full with 12 L s d (PaLM's MFU, 2204.02311, appendix B). deepseek (2401.02954):
    6 x trunk + 12 L s d. all: 6 x trunk, head and token table, untied (Hoffmann et al. 2022, 2203.15556);
    chinchilla: its appendix F, with the token table as a product and the softmax of attention. Tables of positions are
    in neither, as in the papers. L layers, s = `length`, d = heads x head width.
    """
    number = counts(model, spec)
    trunk, head = number["params_trunk"], number["params_head"]
    tokens = params.count({name: part for name, part in spec.items() if name == "embed"}, "embedding")
    work = {
        "flops_kaplan": 6 * trunk,
        "flops_head": 6 * (trunk + head),
        "flops_all": 6 * (trunk + head + tokens),
    }
    if not hasattr(model, "heads") or not hasattr(model, "attention_flops"):
        return work
    heads = model.layers * model.heads
    pairs = heads * (getattr(model, "head_dim", None) or model.width // model.heads) * length
    return work | {
        "flops_kaplan_attention": 6 * trunk + 6 * pairs,
        "flops_head_causal": 6 * (trunk + head) + 6 * pairs,
        "flops_head_full": 6 * (trunk + head) + 12 * pairs,
        "flops_deepseek": 6 * trunk + 12 * pairs,
        "flops_chinchilla": 3 * (2 * tokens + 2 * trunk + 4 * pairs + 3 * heads * length + 2 * head),
    }
