"""The manifests agree with each other and with the programs they start: no cluster is needed to find a wrong port."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from deepseek.cli import COMMANDS

yaml = pytest.importorskip("yaml")

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
FILES = sorted(KUBERNETES.rglob("*.yaml"))
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
APPS = ("replica", "router")
MARGIN = 10  #: seconds that a program gets after its drain


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def objects() -> Iterator[dict[str, Any]]:
    for path in FILES:
        if path.name != "kustomization.yaml":
            yield from documents(path)


def one(kind: str, name: str) -> dict[str, Any]:
    [found] = [o for o in objects() if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


def container(app: str) -> dict[str, Any]:
    [found] = one("Deployment", app)["spec"]["template"]["spec"]["containers"]
    return found


def started(app: str) -> Any:
    """The command that a container starts, as our own command line reads its arguments."""
    name, *arguments = container(app)["args"]
    parsed = tyro.cli(COMMANDS[name], args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    return parsed


def port_of(app: str) -> int:
    [port] = container(app)["ports"]
    assert port["name"] == "http"
    found: int = port["containerPort"]
    return found


def labels_of(app: str) -> dict[str, str]:
    found: dict[str, str] = one("Deployment", app)["spec"]["template"]["metadata"]["labels"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(KUBERNETES)))
def test_every_document_is_an_object(path: Path) -> None:
    for document in documents(path):
        assert {"apiVersion", "kind"} <= set(document)
        if path.name != "kustomization.yaml":
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
            assert "namespace" not in document["metadata"], "the kustomization sets it"


def test_names_are_used_once_and_every_file_is_listed() -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in objects()]
    assert len(names) == len(set(names))
    for path in KUBERNETES.rglob("kustomization.yaml"):
        listed = documents(path)[0]["resources"]
        assert sorted(listed) == sorted(p.name for p in path.parent.glob("*.yaml") if p != path)
    assert (
        documents(KUBERNETES / "kustomization.yaml")[0]["namespace"]
        == one("Namespace", "deepseek")["metadata"]["name"]
    )


@pytest.mark.parametrize("app", APPS)
def test_the_command_listens_where_everybody_looks(app: str) -> None:
    command = started(app)
    assert command.port == port_of(app)
    assert command.host == "0.0.0.0"
    assert re.search(rf"^EXPOSE .*\b{command.port}\b", DOCKERFILE, re.M)
    for probe, path in (("startupProbe", None), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        asked = container(app)[probe]["httpGet"]
        assert asked["port"] == "http"
        assert asked["path"] in ((path,) if path else ("/ready", "/health"))


def test_services_and_the_router_find_their_pods() -> None:
    for name, app in (("replicas", "replica"), ("deepseek", "router")):
        service = one("Service", name)
        assert service["spec"]["selector"].items() <= labels_of(app).items()
        [port] = service["spec"]["ports"]
        assert port["targetPort"] == "http"
        assert sum(service["spec"]["selector"].items() <= labels_of(a).items() for a in APPS) == 1
    assert one("Service", "replicas")["spec"]["clusterIP"] == "None", "the router wants all addresses"
    assert started("router").replicas == (f"http://replicas:{port_of('replica')}",)


@pytest.mark.parametrize("app", APPS)
def test_nobody_is_killed_while_it_drains(app: str) -> None:
    spec = one("Deployment", app)["spec"]["template"]["spec"]
    [word, seconds] = container(app)["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    assert spec["terminationGracePeriodSeconds"] >= int(seconds) + started(app).drain + MARGIN
    probe = container(app)["readinessProbe"]
    assert int(seconds) >= probe["periodSeconds"] * probe["failureThreshold"]
    assert started("router").drain >= started("replica").drain, (
        "a router outlives the answers that it passes on"
    )


def test_the_router_waits_longer_than_a_replica_works() -> None:
    assert started("router").silence > started("replica").timeout


def test_a_model_has_time_to_load() -> None:
    probe = container("replica")["startupProbe"]
    assert probe["httpGet"]["path"] == "/ready"
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300


@pytest.mark.parametrize("app", APPS)
def test_selectors_are_one(app: str) -> None:
    deployment = one("Deployment", app)
    assert deployment["spec"]["selector"]["matchLabels"] == labels_of(app)
    assert deployment["spec"]["replicas"] >= 2
    budget = one("PodDisruptionBudget", app)
    assert budget["spec"]["selector"]["matchLabels"] == labels_of(app)
    assert budget["spec"]["maxUnavailable"] == 1
    [spread] = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels_of(app)
    policy = one("NetworkPolicy", app)
    assert policy["spec"]["podSelector"]["matchLabels"] == labels_of(app)
    monitor = one("ServiceMonitor", app)
    services = [o for o in objects() if o["kind"] == "Service"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert [s["spec"]["selector"] for s in services if wanted <= s["metadata"]["labels"].items()] == [
        labels_of(app)
    ]
    assert monitor["spec"]["endpoints"][0]["path"] == "/metrics"


def test_only_the_router_reaches_a_replica() -> None:
    nothing = one("NetworkPolicy", "nothing")["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    [rule] = one("NetworkPolicy", "replica")["spec"]["ingress"]
    assert rule["ports"] == [{"port": port_of("replica"), "protocol": "TCP"}]
    assert rule["from"][0]["podSelector"]["matchLabels"] == labels_of("router")
    assert "egress" not in one("NetworkPolicy", "replica")["spec"]
    router = one("NetworkPolicy", "router")["spec"]
    assert router["ingress"] == [{"ports": [{"port": port_of("router"), "protocol": "TCP"}]}]
    assert router["egress"][0]["to"][0]["podSelector"]["matchLabels"] == labels_of("replica")
    assert router["egress"][0]["ports"] == [{"port": port_of("replica"), "protocol": "TCP"}]


@pytest.mark.parametrize("app", APPS)
def test_pods_keep_to_the_restricted_standard(app: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, level 'restricted', and read-only."""
    pod = one("Deployment", app)["spec"]["template"]["spec"]
    user = pod["securityContext"]
    assert user["runAsNonRoot"] is True
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in DOCKERFILE
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    context = container(app)["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {next(k for k in v if k != "name") for v in pod["volumes"]} <= {
        "emptyDir",
        "secret",
        "persistentVolumeClaim",
    }
    assert (
        one("Namespace", "deepseek")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )


@pytest.mark.parametrize("app", APPS)
def test_what_is_mounted_is_there(app: str) -> None:
    pod = one("Deployment", app)["spec"]["template"]["spec"]
    mounts = {m["name"]: m for m in container(app)["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert started(app).keys_file.startswith(mounts["keys"]["mountPath"] + "/")
    assert (
        "--from-file=" + Path(started(app).keys_file).name in (KUBERNETES / "kustomization.yaml").read_text()
    )
    assert mounts["scratch"]["mountPath"] == re.search(r"HOME=(\S+)", DOCKERFILE)[1]  # type: ignore[index]
    if app == "replica":
        assert started(app).model == mounts["model"]["mountPath"]
        assert mounts["model"]["readOnly"]
        assert one("PersistentVolumeClaim", volumes["model"]["persistentVolumeClaim"]["claimName"])
    for object_ in objects():
        if object_["kind"] == "ServiceMonitor":
            credentials = object_["spec"]["endpoints"][0]["authorization"]["credentials"]
            assert credentials == {"name": volumes["keys"]["secret"]["secretName"], "key": "prometheus"}


def test_resources_and_images() -> None:
    kustomization = documents(KUBERNETES / "kustomization.yaml")[0]
    [image] = kustomization["images"]
    for app in APPS:
        assert container(app)["image"] == image["name"]
        assert {"cpu", "memory"} <= set(container(app)["resources"]["requests"])
    assert container("replica")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container("router")["resources"]["limits"]
    assert 'ENTRYPOINT ["deepseek"]' in DOCKERFILE
    from deepseek import __version__

    assert image["newTag"] == __version__


def test_scaling_reads_metrics_that_the_server_has() -> None:
    from deepseek.serve.request import EngineStats
    from deepseek.serve.server.instruments import ServerMetrics

    scaled = one("ScaledObject", "replica")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "replica"
    assert (
        scaled["minReplicaCount"]
        <= one("Deployment", "replica")["spec"]["replicas"]
        <= scaled["maxReplicaCount"]
    )
    there = ServerMetrics().render("model", EngineStats(), 0).decode()
    names = [n for t in scaled["triggers"] for n in re.findall(r"vllm:\w+", t["metadata"]["query"])]
    assert "vllm:num_requests_waiting" in names
    assert [n for n in names if f"\n{n}{{" not in there] == []
    namespace = documents(KUBERNETES / "kustomization.yaml")[0]["namespace"]
    assert all(f'namespace="{namespace}"' in t["metadata"]["query"] for t in scaled["triggers"])
    patch = yaml.safe_load(
        documents(KUBERNETES / "autoscaling" / "kustomization.yaml")[0]["patches"][0]["patch"]
    )
    assert patch == [{"op": "remove", "path": "/spec/replicas"}]


def test_the_image_holds_what_the_commands_need() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
    root = DEPLOY.parent
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    for name in " ".join(copied).split():
        assert (root / name).exists()
        assert f"!{name.removeprefix('./')}" in ignored
    extras = re.search(r"\.\[([\w,]+)\]", DOCKERFILE)[1].split(",")  # type: ignore[index]
    declared = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", declared, re.M) for extra in extras)
