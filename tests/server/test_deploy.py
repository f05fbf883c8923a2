"""The files under deploy/ say what the code takes: parsed by their tools where those are there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mor.server.ray.settings import read_settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text("utf-8"))


def test_the_arguments_of_the_serve_configuration_are_known() -> None:
    [application] = read("serve.yaml")["applications"]
    assert application["import_path"] == "mor.server.ray:app"
    settings = read_settings(application["args"])
    assert settings.count().most == 8


def test_the_serve_configuration_fits_rays_own_schema() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="the extra ray is not installed")
    made = schema.ServeDeploySchema(**read("serve.yaml"))
    assert made.applications[0].args["autoscale"] == "2:8"


def test_the_kubernetes_manifest() -> None:
    manifest = read("rayservice.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    spec = manifest["spec"]
    assert yaml.safe_load(spec["serveConfigV2"]) == read("serve.yaml")
    cluster = spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    drain = read("serve.yaml")["applications"][0]["args"]["drain_seconds"]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > drain
        named = {volume["name"] for volume in pod["volumes"]}
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= named
        for what in ("requests", "limits"):
            assert re.fullmatch(r"\d+", container["resources"][what]["cpu"])
            assert re.fullmatch(r"\d+Gi", container["resources"][what]["memory"])
    workers = cluster["workerGroupSpecs"][0]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_compose_file() -> None:
    compose = read("compose.yaml")
    [service] = compose["services"].values()
    assert set(compose) == {"name", "services"}
    known = {  # of the Compose specification
        "build", "command", "cpus", "environment", "healthcheck", "mem_limit", "ports", "restart",
        "shm_size", "stop_grace_period", "volumes",
    }  # fmt: skip
    assert set(service) <= known
    from mor.cli.serve import serve

    options = [word for word in service["command"] if word.startswith("--")]
    assert {word.lstrip("-").replace("-", "_") for word in options} <= set(serve.__annotations__)
    docker = shutil.which("docker")
    if (
        docker
        and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        said = subprocess.run(
            [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "-q"],
            capture_output=True, env={"MOR_API_KEY": "x", "MOR_MODEL": "/m", "PATH": docker},
        )  # fmt: skip
        assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("name", ["train.slurm", "train_node.sh"])
def test_the_shell_reads_the_scripts(name: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    said = subprocess.run([bash, "-n", str(DEPLOY / name)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
