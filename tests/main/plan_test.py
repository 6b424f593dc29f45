"""Plans: for host devices here, and for TPUs and GPUs where their compilers are installed."""

import importlib.util
import json
import subprocess

import pytest

from tests.main.helpers import TINY, call, start

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu comes with the extra [plan]")
needs_cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="JAX's CUDA plugin comes with the extra [plan]"
)
# Products and gradients of layers outweigh all else, as in the models that are planned.
SMALL = [f"--set=model.{s}" for s in ("layers=4", "width=512", "heads=4", "kv_heads=4", "mlp_width=2048")]
SMALL += ["--set=model.vocab_size=512", "--set=model.remat=none"]
SMALL += ["--set=train.batch_size=8", "--set=train.seq_len=1024", "--set=train.accumulate=1", "--set=mesh.fsdp=1"]


def plan(tmp_path, *arguments, code=0):
    process = start("plan", *arguments, f"--out={tmp_path}", devices=None, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == code, out
    return out, json.loads((tmp_path / "plan.json").read_text())


def test_a_plan_for_host_devices_has_memory_and_collectives_and_no_speed(tmp_path):
    sizes = ("--set=mesh.fsdp=2", "--set=mesh.tensor=2", "--set=model.vocab_size=128")
    out, found = plan(tmp_path, f"--experiment={TINY}", "--hardware=cpu:8", *sizes)
    assert "mesh data=2 x fsdp=2 x tensor=2" in out and "tokens/s" not in out
    assert found["state_donated"] and found["fits"] and found["tokens_per_second"] is None
    held = found["memory_bytes"]
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert found["parameters"] * 4 / 4 <= held["parameters"] < found["parameters"] * 4
    assert {"fsdp", "tensor"} <= {axis for c in found["collectives"] for axis in c["axes"]}
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_plan_of_decoding_has_weights_cache_and_temporaries(tmp_path):
    sizes = ("--set=mesh.tensor=2", "--set=mesh.fsdp=1", "--set=model.vocab_size=128", "--decode=16:32")
    out, found = plan(tmp_path, f"--experiment={TINY}", "--hardware=cpu:8", *sizes)
    assert "one token for 16 rows of up to 32" in out and found["decode"] == {"rows": 16, "context": 32}
    assert {"weights", "cache", "temporaries"} <= set(found["memory_bytes"])
    assert found["cache_donated"] and found["tokens_per_second"] is None
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--hardware=v5p:3x3x3"], "no topology 3x3x3"),
        (["--hardware=v6"], "did you mean"),
        (["--hardware=cpu:8", "--search"], "ranks by speed"),
        (["--hardware=h100:8", "--set=data.tokenizer=char"], "does not say how many ids"),
        ([], "--hardware is missing"),
        (["--hardware=cpu:8", "--decode=8:x"], "ROWS:CONTEXT"),
        (["--hardware=h100:8", "--decode=8", "--search"], "leave them out with --decode"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(arguments, words, capfd):
    assert call("plan", f"--experiment={TINY}", *arguments) == 2
    assert words in capfd.readouterr().err


@pytest.mark.slow
def test_training_takes_the_planned_step_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    source = "--source=synthetic:markov?symbols=8&tokens=9000"
    assert start("corpus", source, "--tokenizer=char", f"--out={tmp_path / 'corpus'}").wait(100) == 0
    arguments = (f"--experiment={TINY}", f"--corpus={tmp_path / 'corpus'}", "--set=mesh.fsdp=2", "--set=train.steps=2")
    plan(tmp_path, *arguments, "--hardware=cpu:8")
    (step,) = (tmp_path / "cache").glob("jit_step-*-cache")
    assert start("train", *arguments, f"--workdir={tmp_path / 'run'}", devices=8).wait(300) == 0
    assert list((tmp_path / "cache").glob("jit_step-*-cache")) == [step]
    assert list((tmp_path / "cache").glob("jit_new-*-cache"))  # What was not planned is added.


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_gpus_send_what_the_formulas_say(tmp_path, axis):
    _, found = plan(tmp_path, "--experiment=llama_1b", "--hardware=h100:8", *SMALL, f"--set=mesh.{axis}=8")
    sent = sum(c["sent_bytes"] for c in found["collectives"])
    assert sent == pytest.approx(found["sent_bytes_by_formula"][axis], rel=0.05)
    assert found["state_donated"] and found["fits"] and found["mfu"][0] < found["mfu"][1] < 1


@pytest.mark.slow
@needs_libtpu
def test_tpus_gather_what_the_formula_says_and_hold_no_scores(tmp_path):
    length = 2048
    arguments = ("--hardware=v5e:2x4", *SMALL, "--set=mesh.fsdp=8", f"--set=train.seq_len={length}")
    _, found = plan(tmp_path, "--experiment=llama_1b", *arguments)
    gathered = sum(c["sent_bytes"] for c in found["collectives"] if c["kind"] == "all-gather")
    # Half of the formula's bytes are gathers in bfloat16, the rest the gradients in float32.
    assert gathered == pytest.approx(found["sent_bytes_by_formula"]["fsdp"] / 2, rel=0.05)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("axis, remat", [("tensor", "full"), ("seq", "none")])
def test_what_passes_along_tensor_and_seq_is_what_the_formulas_say(tmp_path, axis, remat):
    sizes = ("--set=mesh.fsdp=2", f"--set=mesh.{axis}=4", "--set=model.vocab_size=32768", "--set=train.seq_len=4096")
    arguments = (*SMALL, *sizes, f"--set=model.remat={remat}")
    _, found = plan(tmp_path, "--experiment=llama_1b", "--hardware=v5e:2x4", *arguments)
    sent = sum(c["sent_bytes"] for c in found["collectives"] if c["axes"] == [axis])
    formula = found["sent_bytes_by_formula"]
    # Gradients are reduced along the sequence too.
    assert sent == pytest.approx(formula[axis] + formula.get("data", 0.0), rel=0.05)


@pytest.mark.slow
@needs_libtpu
def test_tpus_in_stages_send_what_the_formulas_say(tmp_path):
    mesh = ("--set=mesh.stage=2", "--set=mesh.fsdp=4")
    _, found = plan(tmp_path, "--experiment=llama_1b", "--hardware=v5e:2x4", *SMALL, *mesh)
    sent: dict = {}
    for c in found["collectives"]:
        sent.setdefault(tuple(c["axes"]), {})[c["kind"]] = c["sent_bytes"]
    ticks, micro_batch = 3, 8 * 1024 / 4 / 2 * 512 * 2
    assert sent["stage",]["collective-permute"] == pytest.approx(2 * ticks * micro_batch, rel=0.05)
    # One of the sums of what enters and leaves the stages is fused with the slice that follows.
    assert sum(sent["stage",].values()) == pytest.approx(found["sent_bytes_by_formula"]["stage"], rel=0.1)
    assert sum(sent["fsdp",].values()) == pytest.approx(found["sent_bytes_by_formula"]["fsdp"], rel=0.05)
    assert found["state_donated"]


@pytest.mark.slow
@needs_libtpu
def test_on_a_tpu_moments_on_the_host_leave_the_device_and_visit_it_layer_by_layer(tmp_path):
    arguments = ("--experiment=llama_1b", "--hardware=v5e:2x4", *SMALL, "--set=mesh.fsdp=8")
    _, here = plan(tmp_path, *arguments)
    out, there = plan(tmp_path, *arguments, "--set=train.offload_optimizer=True")
    moments = here["memory_bytes"]["optimizer"]
    assert there["host_bytes"]["optimizer"] == pytest.approx(moments, rel=0.01) and "optimizer, on the host" in out
    assert here["needed_bytes"] - there["needed_bytes"] > 0.9 * moments
    assert here["host_bytes"] == {} and there["state_donated"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("decode", [(), ("--decode=64",)], ids=["training", "decoding"])
def test_what_a_tpus_compiler_refuses_does_not_fit(tmp_path, decode):
    mesh = ("--set=mesh.fsdp=1", "--set=mesh.tensor=8") if decode else ("--set=mesh.fsdp=8",)
    arguments = ("--experiment=llama_8b", "--hardware=v5e:2x4", "--set=train.batch_size=64", *mesh, *decode)
    out, found = plan(tmp_path, *arguments, code=1)
    assert "does not fit" in out and "was not made" in out
    assert not found["fits"] and found["needed_bytes"] > found["device_bytes"] and found["collectives"] is None


@pytest.mark.slow
@needs_libtpu
def test_decoding_on_tpus_is_bound_by_memory(tmp_path):
    arguments = ("--experiment=llama_8b", "--hardware=v5e:2x4", "--set=mesh.fsdp=1", "--set=mesh.tensor=8")
    out, found = plan(tmp_path, *arguments, "--decode=16", "--price=1.2")
    assert found["bound"] in ("weights", "cache") and "a million cost" in out
    assert found["memory_bytes"]["weights"] == pytest.approx(2 * found["parameters"] / 8, rel=0.01)
    sent = sum(c["sent_bytes"] for c in found["collectives"])
    assert sent == pytest.approx(found["sent_bytes_by_formula"]["tensor"], rel=0.05)


@pytest.mark.slow
@needs_libtpu
def test_what_enters_each_layer_can_be_kept_on_the_host(tmp_path):
    arguments = ("--experiment=llama_1b", "--hardware=v5e:2x4", *SMALL, "--set=mesh.fsdp=8")
    arguments += ("--set=model.layers=8", "--set=train.batch_size=128")
    kept, needed = 8 * 16 * 1024 * 512 * 2, {}  # Layers of 16 rows of 1,024 a device, in bfloat16.
    for remat in ("full", "offload"):
        _, found = plan(tmp_path, *arguments, f"--set=model.remat={remat}")
        needed[remat] = found["needed_bytes"]
    assert found["host_bytes"] == {"activations": pytest.approx(kept, rel=0.01)}
    assert needed["full"] - needed["offload"] > 0.75 * kept  # The layers on their way take some of it.


@pytest.mark.slow
@needs_cuda
def test_moments_on_the_host_are_not_planned_for_gpus_that_are_not_here():
    arguments = ("--experiment=llama_1b", "--hardware=h100:1", *SMALL, "--set=train.offload_optimizer=True")
    process = start("plan", *arguments, devices=None, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 2 and "train.offload_optimizer=True: JAX names no memory 'pinned_host'" in errors


@pytest.mark.slow
@needs_cuda
def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path):
    big = ("--set=model.layers=2", "--set=model.width=16384", "--set=model.mlp_width=65536", "--set=model.heads=128")
    arguments = ("--experiment=llama_1b", "--hardware=h100:8", *big, "--set=model.head_dim=128", "--set=mesh.fsdp=1")
    common = ("--set=model.vocab_size=32000", "--set=train.batch_size=8", "--set=train.accumulate=1")
    out, found = plan(tmp_path, *arguments, *common, code=1)
    assert "does not fit" in out and "GB too much" in out and "would fit by estimate" in out
    assert not found["fits"] and found["needed_bytes"] > found["device_bytes"]


@pytest.mark.slow
@needs_cuda
def test_a_gpu_without_its_library_here_is_planned_with_attention_in_blocks(tmp_path):
    """The recipe has no documents to keep apart, so that on the GPU itself cuDNN would take it."""
    sizes = ("--set=model.layers=2", "--set=train.batch_size=8", "--set=train.accumulate=1", "--set=model.scan=True")
    out, found = plan(tmp_path, "--experiment=gpt2_124m", "--hardware=h200:1", *sizes)
    assert found["fits"] and ("cuDNN is not installed" in out) == bool(found["notes"])
