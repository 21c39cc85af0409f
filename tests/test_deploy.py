"""The files for many machines: of the right form, and naming only what exists. No cloud is asked."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler import sdk
from ray.autoscaler._private.docker import validate_docker_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tune.question import SearchQuestion, ask

ROOT = Path(__file__).parents[1]
AWS, KUBERAY = ROOT / "deploy" / "ray-cluster.yaml", ROOT / "deploy" / "kuberay.yaml"
MINOR = ".".join(ray.__version__.split(".")[:2])
# Field names of ray.io/v1, by hand from KubeRay's reference: its schemas are in no wheel.
FIELDS = {
    "RayJobSpec": "entrypoint shutdownAfterJobFinishes ttlSecondsAfterFinished backoffLimit rayClusterSpec",
    "RayClusterSpec": "rayVersion authOptions headGroupSpec workerGroupSpecs",
    "HeadGroupSpec": "rayStartParams template",
    "WorkerGroupSpec": "groupName replicas minReplicas maxReplicas rayStartParams template",
    "PodSpec": "securityContext containers volumes",
    "Container": "name image resources volumeMounts",
}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load(AWS.read_text()))


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERAY.read_text()))


@pytest.fixture(scope="module")
def groups(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    spec = documents[1]["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def commands(file: Path) -> list[list[str]]:
    """The words after each `python -m tune.asha` in a file, its comments included."""
    text = re.sub(r"\\\n#\s*", " ", file.read_text())
    text = re.sub(r"\n\s+(?=--)", " ", text)
    return [shlex.split(found) for found in re.findall(r"python -m tune\.asha ([^'\n]*)", text)]


def versions(text: str) -> set[str]:
    return set(re.findall(r"(?:ray:|ray-|rayVersion: )(\d+\.\d+)\.\d+", text))


def test_the_cluster_file_has_the_form_that_ray_up_checks(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(json.loads(json.dumps(cluster)))
    validate_config(prepared)
    validate_docker_config(prepared)
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config({**json.loads(json.dumps(cluster)), "idle_timeout": 5}))


def test_the_cluster_has_a_head_without_a_gpu_and_up_to_eight_workers_with_one(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, cluster["max_workers"]) == (0, 8)


def test_the_cluster_file_names_only_what_exists(cluster: dict[str, Any]) -> None:
    mounts = {there: here for there, here in cluster["file_mounts"].items() if not here.startswith("~")}
    assert mounts == {"/home/ray/cifar_lab": "."} and (ROOT / "pyproject.toml").exists()
    assert cluster["setup_commands"] == ["python -m pip install --quiet /home/ray/cifar_lab"]
    assert any("/shared:/shared" in option for option in cluster["docker"]["run_options"])
    options = {option for parameter in start.params for option in parameter.opts}
    for line in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert {word.partition("=")[0] for word in line.split() if word.startswith("--")} <= options
    assert "bundles" in inspect.signature(sdk.request_resources).parameters
    assert "request_resources(bundles=[" in AWS.read_text()


def test_nothing_serves_a_cluster_without_a_token_or_to_the_world(
    cluster: dict[str, Any], documents: list[dict[str, Any]]
) -> None:
    starts = [c for c in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert documents[1]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("file", [AWS, KUBERAY], ids=lambda file: file.name)
def test_the_images_have_the_ray_that_is_installed_and_no_file_knows_a_person(file: Path) -> None:
    text = file.read_text()
    assert versions(text) == {MINOR}
    assert not re.findall(r"https?://[^\s/]*@|(?i:password|secret)|AKIA|BEGIN|/(?:root|Users)/", text)
    assert set(re.findall(r"/home/\w+", text)) <= {"/home/ray"}


@pytest.mark.parametrize("file", [AWS, KUBERAY], ids=lambda file: file.name)
def test_the_search_in_the_file_is_one_that_our_parser_takes(file: Path) -> None:
    (words,) = commands(file)
    question = ask(words)
    assert isinstance(question, SearchQuestion)
    assert (question.options.address, question.options.gpus_per_trial) == ("auto", 1)
    assert str(question.folder).startswith("/shared/") and str(question.base.data_dir).startswith("/shared/")


def test_a_trial_fits_on_a_worker(cluster: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    on_aws, on_kubernetes = (ask(commands(file)[0]).options.cpus_per_trial for file in (AWS, KUBERAY))
    assert on_aws <= cluster["available_node_types"]["gpu"]["resources"]["CPU"]
    limits = groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert on_kubernetes <= int(limits["cpu"])


def test_the_manifest_is_a_claim_and_a_ray_job_of_known_fields(
    documents: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    assert [(d["apiVersion"], d["kind"]) for d in documents] == [
        ("v1", "PersistentVolumeClaim"),
        ("ray.io/v1", "RayJob"),
    ]
    assert documents[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", d["metadata"]["name"]) for d in documents)
    spec = documents[1]["spec"]
    known = {name: set(fields.split()) for name, fields in FIELDS.items()}
    assert set(spec) == known["RayJobSpec"]
    assert set(spec["rayClusterSpec"]) == known["RayClusterSpec"]
    assert set(groups[0]) == known["HeadGroupSpec"] and set(groups[1]) == known["WorkerGroupSpec"]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    assert groups[1]["minReplicas"] <= groups[1]["replicas"] <= groups[1]["maxReplicas"]
    for group in groups:
        assert set(group["template"]["spec"]) == known["PodSpec"]
        (container,) = group["template"]["spec"]["containers"]
        assert set(container) == known["Container"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        (volume,) = group["template"]["spec"]["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        assert volume["persistentVolumeClaim"]["claimName"] == documents[0]["metadata"]["name"]
    gpus = [g["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for g in groups]
    assert gpus == [None, "1"]
