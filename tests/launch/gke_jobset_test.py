"""The manifest is one that JobSet takes, and says what each exit code leads to."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.parallel import layout

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "gke_jobset.py"
# The fields of a JobSet v1alpha2 that are used here, from its API reference; its Jobs are checked by Kubernetes' own
# schema. LM_JOBSET_CRD names the file jobset.x-k8s.io_jobsets.yaml of a release, for its whole schema (without CEL).
REASONS = {"type": "array", "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}}
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]


def fields(needed, **properties):
    return {"type": "object", "properties": properties, "required": needed.split(), "additionalProperties": False}


RULE = fields(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ACTIONS},
    onJobFailureReasons=REASONS,
    onJobFailureMessagePatterns={"type": "array", "items": {"type": "string"}},
    targetReplicatedJobs={"type": "array", "items": {"type": "string"}},
)
SCHEMA = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object"},
    spec=fields(
        "replicatedJobs",
        failurePolicy=fields(
            "",
            maxRestarts={"type": "integer"},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={"type": "array", "items": RULE},
        ),
        replicatedJobs={
            "type": "array",
            "items": fields(
                "name template",
                name={"type": "string"},
                replicas={"type": "integer", "minimum": 1},
                template=fields("spec", spec={"type": "object"}),
            ),
        },
    ),
)
TPU = ("--name=run1", "--image=i", "--tpu=v6e:4x4", "--slices=2")
GPU = ("--name=run1", "--image=i", "--gpu=h100:8", "--nodes=4")

spec = importlib.util.spec_from_file_location("gke_jobset", SCRIPT)
gke_jobset = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gke_jobset)


def render(*arguments, command=("lm", "train", "--workdir=gs://b/run1")):
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments, "--", *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def environment(manifest):
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in pod(manifest)["containers"][0]["env"]}


def strict(schema):
    """The schema of a CRD as JSON Schema that refuses what it does not know, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return {name: strict(item) for name, item in schema.items()} | closed


def errors(manifest):
    """What the schemas say against it."""
    jsonschema, kubernetes = (pytest.importorskip(name) for name in ("jsonschema", "kubernetes_validate"))
    schema = SCHEMA
    if crd := os.environ.get("LM_JOBSET_CRD"):
        (version,) = yaml.safe_load(pathlib.Path(crd).read_text())["spec"]["versions"]
        schema = strict(version["schema"]["openAPIV3Schema"])
    found = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    try:
        kubernetes.validate(job | manifest["spec"]["replicatedJobs"][0]["template"], "1.31", strict=True)
    except kubernetes.ValidationError as error:
        found.append(str(error))
    return found


OPTIONS = [
    TPU,
    (*TPU, "--spot", "--queue=q", "--service_account=s", "--env=A=b"),
    ("--name=run1", "--image=i", "--tpu=v5e:2x4", "--chips_per_node=8"),
    GPU,
    (*GPU, "--claim=data:/data", "--pod_network"),
]


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_jobset_takes_it(arguments):
    assert errors(render(*arguments)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "imagee"), "i"),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "actions"), "FailJob"),
        (("spec", "failurePolicy", "rules", 0, "action"), "FailJobSets"),
    ],
)
def test_the_schema_refuses_what_is_misspelt(path, value):
    manifest = render(*TPU)
    at = manifest
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    assert len(errors(manifest)) >= 1


def outcome(manifest, exit_code, evicted=False):
    """The action for a set of which one pod ended so, by the rules of Jobs and JobSets and the messages of Jobs."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if exit_code in rule.get("onExitCodes", {}).get("values", ()):
            reason = "PodFailurePolicy"
            message = (
                f"Container lm for pod default/x failed with exit code {exit_code} matching FailJob rule at index {i}"
            )
            break
        if evicted and rule.get("onPodConditions"):
            reason = "PodFailurePolicy"
            message = f"Pod default/x has condition DisruptionTarget matching FailJob rule at index {i}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("arguments", (TPU, GPU), ids=("tpu", "gpu"))
def test_exit_codes_decide(arguments):
    manifest = render(*arguments)
    assert {outcome(manifest, code) for code in (1, 2, 16, 17)} == {"FailJobSet"}
    assert outcome(manifest, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {outcome(manifest, code) for code in (134, 137, 143)} == {"RestartJobSet"}  # Counts against --restarts.
    assert {outcome(manifest, code, True) for code in (1, 75, 137)} == {"RestartJobSetAndIgnoreMaxRestarts"}
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod(manifest)["restartPolicy"] == "Never"
    assert pod(manifest)["terminationGracePeriodSeconds"] == 300


def test_a_tpu_set_has_a_job_a_slice_and_a_pod_a_host():
    manifest = render(*TPU)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert pod(manifest)["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod(manifest)["hostNetwork"] and "LM_NUM_PROCESSES" not in environment(manifest)


def test_gpu_pods_find_their_place_from_what_they_are_given():
    manifest = render(*GPU, "--env=A=b=c")
    given = environment(manifest)
    assert given["A"] == "b=c" and "jobset-uid" in given["LM_LAUNCH"]["fieldRef"]["fieldPath"]
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    found = layout.resolve(texts | {"JOB_COMPLETION_INDEX": "3"})
    # The pod's name below the headless service, which is called as the set is.
    assert (found.coordinator, found.num_processes, found.process_id) == ("run1-lm-0-0.run1:8476", 4, 3)
    assert found.patience_s > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tpu=v9:4x4",), "v5p"),
        (("--tpu=v6e:44",), "TYPE:TOPOLOGY"),
        (("--tpu=v6e:2x3", "--chips_per_node=4"), "does not divide"),
        (("--tpu=v6e:4x4", "--nodes=2"), "--nodes=2 has no effect"),
        (("--gpu=h100:8", "--slices=2"), "--slices=2 has no effect"),
        (("--gpu=h100",), "TYPE:COUNT"),
        (("--gpu=h100:8", "--name=Run_1"), "--name=Run_1"),
        (("--gpu=h100:8", f"--name={'a' * 60}"), "at most 50"),
        (("--gpu=h100:8", "--env=A"), "lacks a '='"),
    ],
)
def test_what_cannot_be_is_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        gke_jobset.main(["--name=run1", "--image=i", *arguments, "--", "lm"])
    assert stop.value.code == 2 and said in capsys.readouterr().err


text = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")))
plain = st.recursive(
    st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z][a-z./-]*[a-z]", fullmatch=True), inner),
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_what_is_printed_is_read_back(value):
    assert yaml.safe_load(gke_jobset.yaml(value)) == value
