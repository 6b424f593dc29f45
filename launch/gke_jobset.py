"""Prints the JobSet manifest of a run on GKE, TPU slices or GPU nodes, for kubectl.

python launch/gke_jobset.py --name=run1 --image=IMAGE --tpu=v6e:4x4 --slices=2 -- lm train ... | kubectl apply -f -
python launch/gke_jobset.py --name=run1 --image=IMAGE --gpu=h100:8 --nodes=4 -- lm train ... | kubectl apply -f -

Exit code 75 (saved, wants a restart) and evicted pods start the set again as often as it takes; 1, 2, 16 and 17 fail
it; a death by any other cause starts it again up to --restarts times. It takes JobSet 0.10 or newer, whose rules read
the message of a failed Job. LM_LAUNCH is the set's uid: `lm train` gives up with code 1 where three starts of one
launch ended without a newer checkpoint.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

RESTART = 75
FAILURES = (1, 2, 16, 17)
JOB, PORT = "lm", 8476
# What GKE's node label cloud.google.com/gke-tpu-accelerator and gke-accelerator say; other values are taken as given.
TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
GPUS = {
    "a100": "nvidia-tesla-a100",
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the manifest; returns the exit code."""
    print(yaml(jobset(_parse(arguments))))
    return 0


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """The manifest: an Indexed Job for each slice, or one for all nodes, each a pod a node."""
    job = {
        # As many indices as pods; the first that fails fails the Job, and so the set decides.
        "parallelism": options.nodes,
        "completions": options.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                *(_on_exit(codes) for codes in (FAILURES, (RESTART,))),
            ]
        },
        "template": {"spec": _pod(options)},
    }
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    # A slice is a node pool, and has to have one Job's pods on it and no others.
    annotations = (
        {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if options.tpu else {}
    )
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name}
        | ({"labels": labels} if labels else {})
        | ({"annotations": annotations} if annotations else {}),
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": [
                    {
                        "name": "failed",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [f"exit code ({'|'.join(map(str, FAILURES))}) "],
                    },
                    {
                        "name": "saved_or_evicted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [{"name": JOB, "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def _on_exit(codes: Sequence[int]) -> dict[str, Any]:
    return {"action": "FailJob", "onExitCodes": {"containerName": JOB, "operator": "In", "values": [*codes]}}


def _pod(options: argparse.Namespace) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": JOB,
        "image": options.image,
        "command": options.command,
        "env": _environment(options),
        "resources": {"limits": {"google.com/tpu" if options.tpu else "nvidia.com/gpu": options.chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # podFailurePolicy wants it.
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": dict(options.selector),
        "containers": [container],
    }
    if options.nodes * options.slices > 1 and not options.pod_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
    mounts, volumes = [], []
    if options.gpu:  # NCCL's buffers; a container has 64 MB of its own.
        mounts.append({"name": "memory", "mountPath": "/dev/shm"})
        volumes.append({"name": "memory", "emptyDir": {"medium": "Memory"}})
    if options.claim:
        claim, path = options.claim
        mounts.append({"name": "claim", "mountPath": path})
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": claim}})
    if volumes:
        container["volumeMounts"], pod["volumes"] = mounts, volumes
    return pod


def _environment(options: argparse.Namespace) -> list[dict[str, Any]]:
    """LM_LAUNCH and what the user gives; on GPUs the processes too, whose ids are the pods' completion indices.

    GKE tells TPU pods of their slice, and of the other slices, by variables that jax reads.
    """
    uid = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}}
    variables: list[dict[str, Any]] = [{"name": "LM_LAUNCH", "valueFrom": uid}]
    if options.gpu:
        coordinator = f"{options.name}-{JOB}-0-0.{options.name}:{PORT}"
        variables.append({"name": "LM_COORDINATOR", "value": coordinator})
        variables.append({"name": "LM_NUM_PROCESSES", "value": str(options.nodes)})
    return variables + [{"name": name, "value": value} for name, value in options.env]


def yaml(value: Any, indent: int = 0) -> str:
    """Plain values as YAML in blocks; strings and numbers are JSON's, which YAML reads alike."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        return "\n".join(f"{pad}{key}:{_below(item, indent + 1)}" for key, item in value.items())
    if isinstance(value, list) and value:
        return "\n".join(f"{pad}- {yaml(item, indent + 1).lstrip()}" for item in value)
    return pad + json.dumps(value, ensure_ascii=False)


def _below(value: Any, indent: int) -> str:
    nested = isinstance(value, dict | list) and value
    return "\n" + yaml(value, indent) if nested else " " + yaml(value)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/gke_jobset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="of a container with lm and its checkout")
    hardware = parser.add_mutually_exclusive_group(required=True)
    hardware.add_argument("--tpu", metavar="TYPE:TOPOLOGY", help=f"such as v6e:4x4; {', '.join(TPUS)}")
    hardware.add_argument("--gpu", metavar="TYPE:COUNT", help=f"of a node, such as h100:8; {', '.join(GPUS)}")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--nodes", type=int, default=1, help="GPU nodes")
    parser.add_argument(
        "--chips_per_node", type=int, default=4, help="TPU chips: 8 on the machine types that end in 8t"
    )
    parser.add_argument("--restarts", type=int, default=10, help="after deaths other than by exit code 75 or eviction")
    parser.add_argument(
        "--grace", type=int, default=300, help="seconds to save after SIGTERM; spot nodes give up to 25"
    )
    parser.add_argument("--spot", action="store_true", help="spot nodes")
    parser.add_argument("--queue", help="the LocalQueue, where Kueue is installed")
    parser.add_argument("--service_account", help="of the pods, for gs:// and the like")
    parser.add_argument("--claim", type=_pair(":"), metavar="CLAIM:PATH", help="a volume claim and where it is mounted")
    parser.add_argument(
        "--env", type=_pair("="), action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
    )
    parser.add_argument("--pod_network", action="store_true", help="no hostNetwork: the fabric is attached to pods")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what each pod runs")
    options = parser.parse_args(arguments)
    for name in ("slices", "nodes", "chips_per_node"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    try:
        _place(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _place(options: argparse.Namespace) -> None:
    """Fills in the node selector, the nodes of a Job and the chips of a node. Raises ValueError for what cannot be."""
    given = options.tpu or options.gpu
    kind, _, size = given.partition(":")
    if options.tpu:
        if not re.fullmatch(r"\d+x\d+(x\d+)?", size) or kind not in TPUS and not kind.startswith("tpu"):
            raise ValueError(f"--tpu={given} must be TYPE:TOPOLOGY with one of {', '.join(TPUS)}, such as v6e:4x4")
        if options.nodes != 1:
            raise ValueError(f"--nodes={options.nodes} has no effect on TPUs, whose topology says it: leave it out")
        total = math.prod(map(int, size.split("x")))
        options.chips = min(options.chips_per_node, total)
        if total % options.chips:
            raise ValueError(f"--tpu={given} has {total} chips, which --chips_per_node={options.chips} does not divide")
        options.nodes = total // options.chips
        label = "cloud.google.com/gke-tpu-"
        options.selector = {f"{label}accelerator": TPUS.get(kind, kind), f"{label}topology": size}
    else:
        if not size.isdigit() or int(size) < 1 or kind not in GPUS and not kind.startswith("nvidia"):
            raise ValueError(f"--gpu={given} must be TYPE:COUNT with one of {', '.join(GPUS)}, such as h100:8")
        if options.slices != 1:
            raise ValueError(f"--slices={options.slices} has no effect on GPUs: take --nodes")
        options.chips = int(size)
        options.selector = {"cloud.google.com/gke-accelerator": GPUS.get(kind, kind)}
    # Pods are called NAME-lm-SLICE-NODE-abcde, and that has to be a DNS label.
    longest = f"{options.name}-{JOB}-{options.slices - 1}-{options.nodes - 1}-abcde"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name) or len(longest) > 63:
        room = 63 - len(longest) + len(options.name)
        raise ValueError(f"--name={options.name} must be small letters, digits and -, at most {room} of them")


def _pair(separator: str) -> Any:
    def split(text: str) -> tuple[str, str]:
        name, found, value = text.partition(separator)
        if not found or not name:
            raise argparse.ArgumentTypeError(f"{text!r} lacks a {separator!r}")
        return name, value

    return split


if __name__ == "__main__":
    sys.exit(main())
