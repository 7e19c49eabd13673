"""Write every overlay to a folder, rendered, and beside it the pods that KubeRay would make of its Ray clusters: for linters.

python tests/cluster/kubernetes/write_out.py /tmp/rendered
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from manifests.render import Object, render
from manifests.workloads import Pod, pods

OVERLAYS = Path(__file__).resolve().parents[3] / "cluster" / "kubernetes" / "overlays"
_STANDING = {
    "CKV_K8S_8": "the containers that KubeRay adds have no probes, nor has a submitter",
    "CKV_K8S_9": "the containers that KubeRay adds have no probes, nor has a submitter",
    "CKV_K8S_15": "an image is named by version or digest, which does not change",
    "CKV_K8S_35": "boto3 and MLflow read their keys from variables",
    "CKV_K8S_40": "1000 is the user of the image",
    "CKV_K8S_43": "digests are set by overlays/prod/images",
}


def as_pod(pod: Pod) -> Object:
    """Return a Pod object; findings that stand are annotated."""
    skips = {f"checkov.io/skip{number}": f"{name}={why}" for number, (name, why) in enumerate(_STANDING.items(), 1)}
    owner = pod.owner["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{owner['name']}-{pod.group}",
            "namespace": owner.get("namespace", "default"),
            "labels": pod.labels,
            "annotations": skips,
        },
        "spec": pod.spec,
    }


def main() -> None:
    """Write <overlay>.yaml and <overlay>-pods.yaml for each folder below overlays/ that is applied."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for overlay in ("dev", "dev/jobs", "prod", "prod/jobs", "kueue", "kueue/jobs", "kueue/quota"):
        objects = render(OVERLAYS / overlay)
        of_ray = [as_pod(pod) for pod in pods(objects) if pod.group]
        name = overlay.replace("/", "-")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(objects, sort_keys=False))
        if of_ray:
            (folder / f"{name}-pods.yaml").write_text(yaml.safe_dump_all(of_ray, sort_keys=False))


if __name__ == "__main__":
    main()
