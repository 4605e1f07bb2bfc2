"""The manifests for clouds: each form with the rules that its platform has for it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

from embedded.config import REPOSITORY
from gun_detection.settings import PREFIX, Settings

PORT = Settings.model_fields["serve_port"].default
# What a person could misuse who reads the file.
SECRET = ("DATABASE_URL", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "SERVE_KEYS", "RATE_STORE")
CPU_IMAGE, CUDA_IMAGE = "gun-detection-serving:0.1.0-cpu", "gun-detection-serving:0.1.0"
# The memory in MiB that Fargate has for each number of CPU units, as far as it concerns us.
FARGATE = {1024: range(2048, 8193, 1024), 2048: range(4096, 16385, 1024)}
# Requests under way, in seconds; Cloud Run leaves 10, whatever one says.
GRACE = 30


@dataclass
class Container:
    """What the manifests of every platform say, in one form."""

    image: str
    ports: list[int]
    values: dict[str, str]
    secrets: dict[str, str]
    cpu: float
    memory_mib: int
    # (path, seconds until it gives up) by kind.
    probes: dict[str, tuple[str, int]] = field(default_factory=dict)
    grace: int | None = None


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def ecs_container(task: dict[str, Any]) -> Container:
    (one,) = task["containerDefinitions"]
    health = one["healthCheck"]
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", " ".join(health["command"]))
    return Container(
        image=one["image"],
        ports=[mapping["containerPort"] for mapping in one["portMappings"]],
        values={item["name"]: item["value"] for item in one["environment"]},
        secrets={item["name"]: item["valueFrom"] for item in one["secrets"]},
        cpu=int(task["cpu"]) / 1024,
        memory_mib=int(task["memory"]),
        probes={"liveness": (path, health["interval"] * health["retries"])},
        grace=one["stopTimeout"],
    )


def mebibytes(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi")) * 1024


def pod_container(pod: dict[str, Any]) -> Container:
    """Kubernetes and Cloud Run have one form."""
    (one,) = pod["containers"]
    limits = one["resources"]["limits"]
    cpu = limits.get("cpu") or one["resources"]["requests"]["cpu"]
    references = {i["name"]: i["valueFrom"]["secretKeyRef"] for i in one["env"] if "value" not in i}
    return Container(
        image=one["image"],
        ports=[port["containerPort"] for port in one["ports"]],
        values={item["name"]: item["value"] for item in one["env"] if "value" in item},
        secrets={name: f"{at['name']}/{at['key']}" for name, at in references.items()},
        cpu=float(cpu),
        memory_mib=mebibytes(limits["memory"]),
        probes={
            kind: (
                one[f"{kind}Probe"]["httpGet"]["path"],
                one[f"{kind}Probe"]["periodSeconds"] * one[f"{kind}Probe"]["failureThreshold"],
            )
            for kind in ("startup", "readiness", "liveness")
            if f"{kind}Probe" in one
        },
        grace=pod.get("terminationGracePeriodSeconds"),
    )


def azure_container(app: dict[str, Any]) -> Container:
    template = app["properties"]["template"]
    (one,) = template["containers"]
    store = {item["name"]: item for item in app["properties"]["configuration"]["secrets"]}
    references = {item["name"]: item["secretRef"] for item in one["env"] if "secretRef" in item}
    return Container(
        image=one["image"],
        ports=[app["properties"]["configuration"]["ingress"]["targetPort"]],
        values={item["name"]: item["value"] for item in one["env"] if "value" in item},
        secrets={name: store[at]["keyVaultUrl"] for name, at in references.items()},
        cpu=one["resources"]["cpu"],
        memory_mib=mebibytes(one["resources"]["memory"]),
        probes={
            probe["type"].lower(): (
                probe["httpGet"]["path"],
                probe["periodSeconds"] * probe["failureThreshold"],
            )
            for probe in one["probes"]
        },
        grace=template["terminationGracePeriodSeconds"],
    )


def containers() -> Iterator[tuple[str, Container]]:
    deploy = REPOSITORY / "deploy"
    for name in ("task", "task-gpu"):
        yield f"aws-{name}", ecs_container(load(deploy / "aws" / f"{name}.json"))
    for name in ("service", "service-gpu"):
        pod = load(deploy / "gcp" / f"{name}.yaml")["spec"]["template"]["spec"]
        yield f"gcp-{name}", pod_container(pod)
    yield "azure", azure_container(load(deploy / "azure" / "containerapp.yaml"))
    deployment, *_ = yaml.safe_load_all((deploy / "kubernetes" / "predict.yaml").read_text())
    yield "kubernetes", pod_container(deployment["spec"]["template"]["spec"])


CONTAINERS = dict(containers())
each = pytest.mark.parametrize("name", CONTAINERS)


@each
def test_settings_are_known_and_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = CONTAINERS[name]
    known = {PREFIX + field_name.upper() for field_name in Settings.model_fields}
    assert set(one.values) | set(one.secrets) <= known
    given = one.values | dict.fromkeys(one.secrets, "x")
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.serve_model == "champion"
    assert settings.database_url is not None


@each
def test_secrets_come_from_the_store_of_the_platform(name: str) -> None:
    one = CONTAINERS[name]
    assert not [variable for variable in one.values if variable.endswith(SECRET)]
    assert PREFIX + "DATABASE_URL" in one.secrets
    keys = {PREFIX + "SERVE_KEYS"} & set(one.secrets)
    assert keys or PREFIX + "SERVE_KEYS_FILE" in one.values
    for reference in one.secrets.values():
        assert re.match("arn:aws:secretsmanager:|https://VAULT[.]vault[.]|gun-detection", reference)


@each
def test_service_is_reached_where_it_listens(name: str) -> None:
    assert CONTAINERS[name].ports == [PORT]


@each
def test_probes_ask_whether_it_lives_and_whether_it_has_a_model(name: str) -> None:
    one = CONTAINERS[name]
    assert one.probes["liveness"][0] == "/health"
    # A minute of silence, not one missed answer, restarts it.
    assert one.probes["liveness"][1] >= 60
    if name.startswith("aws"):
        target = load(REPOSITORY / "deploy" / "aws" / "target-group.json")
        assert target["HealthCheckPath"] == "/ready"
    elif name.startswith("gcp"):
        assert one.probes["startup"][0] == "/ready"
    else:
        assert one.probes["readiness"][0] == "/ready"
        assert one.probes["startup"][0] == "/health"
    if "startup" in one.probes:
        assert 120 <= one.probes["startup"][1] <= 240


@each
def test_process_has_room_for_a_detector_and_a_full_queue(name: str) -> None:
    one = CONTAINERS[name]
    fields = Settings.model_fields
    queue = fields["serve_queue"].default * fields["serve_max_bytes"].default / 2**20
    assert one.cpu >= 2
    assert one.memory_mib >= 1.5 * (1200 + queue)


@each
def test_requests_under_way_have_time_to_be_finished(name: str) -> None:
    grace = CONTAINERS[name].grace
    assert grace is None if name.startswith("gcp") else grace is not None and grace > GRACE


@each
def test_image_is_the_one_for_the_device(name: str) -> None:
    one = CONTAINERS[name]
    device = one.values[PREFIX + "DEVICE"]
    assert device == ("cuda" if name.endswith("gpu") else "cpu")
    assert one.image.rpartition("/")[2] == (CUDA_IMAGE if device == "cuda" else CPU_IMAGE)


@pytest.mark.parametrize(
    ("file", "service", "operation"),
    [
        ("task.json", "ecs", "RegisterTaskDefinition"),
        ("task-gpu.json", "ecs", "RegisterTaskDefinition"),
        ("service.json", "ecs", "CreateService"),
        ("service-gpu.json", "ecs", "CreateService"),
        ("target-group.json", "elbv2", "CreateTargetGroup"),
        ("scaling-target.json", "application-autoscaling", "RegisterScalableTarget"),
        ("scaling-policy.json", "application-autoscaling", "PutScalingPolicy"),
    ],
)
def test_aws_understands_the_request(deploy: Path, file: str, service: str, operation: str) -> None:
    model = botocore.session.get_session().get_service_model(service)
    shape = model.operation_model(operation).input_shape
    content = load(deploy / "aws" / file)
    report = ParamValidator().validate(content, shape)
    assert not report.has_errors(), report.generate_report()
    assert not wrong_words(content, shape), file


def wrong_words(content: Any, shape: Any) -> list[str]:
    """Values that are none of those that AWS lists; botocore's validation lets them pass."""
    if shape.type_name == "structure":
        return [w for k, v in content.items() for w in wrong_words(v, shape.members[k])]
    if shape.type_name == "list":
        return [word for item in content for word in wrong_words(item, shape.member)]
    known = getattr(shape, "enum", [])
    return [content] if known and content not in known else []


def test_size_is_one_that_fargate_has(deploy: Path) -> None:
    task = load(deploy / "aws" / "task.json")
    assert task["requiresCompatibilities"] == ["FARGATE"]
    assert task["networkMode"] == "awsvpc"
    assert int(task["memory"]) in FARGATE[int(task["cpu"])]


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_parts_on_aws_name_each_other(deploy: Path, kind: str) -> None:
    task, service = (load(deploy / "aws" / f"{part}{kind}.json") for part in ("task", "service"))
    (container,) = task["containerDefinitions"]
    (balancer,) = service["loadBalancers"]
    assert service["taskDefinition"] == task["family"]
    assert (balancer["containerName"], balancer["containerPort"]) == (container["name"], PORT)
    assert load(deploy / "aws" / "target-group.json")["Port"] == PORT
    # The image declares both as volumes, so that they belong to the account that writes to them.
    mounted = [mount["containerPath"] for mount in container["mountPoints"]]
    assert mounted == ["/tmp", "/var/lib/gun-detection"]
    assert container["readonlyRootFilesystem"] is True
    assert container["user"] == "50000:50000"
    gpus = container.get("resourceRequirements", [])
    assert gpus == ([{"type": "GPU", "value": "1"}] if kind else [])


def test_scaling_on_aws_is_of_the_service(deploy: Path) -> None:
    service, target, policy = (
        load(deploy / "aws" / f"{name}.json")
        for name in ("service", "scaling-target", "scaling-policy")
    )
    resource = f"service/{service['cluster']}/{service['serviceName']}"
    assert target["ResourceId"] == policy["ResourceId"] == resource
    assert target["MinCapacity"] == service["desiredCount"] <= target["MaxCapacity"]


def test_cloud_run_has_the_cpu_between_requests_and_limits_what_it_starts(deploy: Path) -> None:
    for name in ("service", "service-gpu"):
        template = load(deploy / "gcp" / f"{name}.yaml")["spec"]["template"]
        notes = template["metadata"]["annotations"]
        # Otherwise a promotion would be seen with the next request only.
        assert notes["run.googleapis.com/cpu-throttling"] == "false"
        least, most = (
            int(notes[f"autoscaling.knative.dev/{word}Scale"]) for word in ("min", "max")
        )
        assert 1 <= least <= most
        queue = Settings.model_fields["serve_queue"].default
        assert template["spec"]["containerConcurrency"] <= queue
        assert template["spec"]["timeoutSeconds"] > Settings.model_fields["serve_timeout"].default


def test_cloud_run_gets_a_gpu_with_what_it_asks_for_beside_one(deploy: Path) -> None:
    pod = load(deploy / "gcp" / "service-gpu.yaml")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"run.googleapis.com/accelerator": "nvidia-l4"}
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}


def test_container_apps_get_a_size_and_probes_that_they_allow(deploy: Path) -> None:
    template = load(deploy / "azure" / "containerapp.yaml")["properties"]["template"]
    (container,) = template["containers"]
    # Without a dedicated profile memory in Gi is twice the CPUs, of which there are at most 4.
    assert (
        float(container["resources"]["memory"].removesuffix("Gi"))
        == 2 * (container["resources"]["cpu"])
    )
    assert container["resources"]["cpu"] <= 4
    for probe in container["probes"]:
        assert probe["failureThreshold"] <= 10
        assert max(probe["periodSeconds"], probe["timeoutSeconds"]) <= 240
    assert 1 <= template["scale"]["minReplicas"] <= template["scale"]["maxReplicas"]


def test_pod_has_no_rights_and_no_foreign_variables(deploy: Path) -> None:
    documents = list(yaml.safe_load_all((deploy / "kubernetes" / "predict.yaml").read_text()))
    deployment, service, scaler, budget = documents
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # GUN_DETECTION_… would come in by the name of any service that is called so.
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 50000
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    # Decoders and threads are counted by it, and the memory is for so many.
    resources = container["resources"]
    assert resources["limits"]["cpu"] == resources["requests"]["cpu"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {
        "/tmp",
        "/var/lib/gun-detection",
    }
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_no_manifest_holds_a_value_that_is_a_secret(deploy: Path) -> None:
    for path in deploy.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "PRIVATE KEY" not in text, path
            assert not re.search(r"://[^/\s:]+:[^@\s]+@", text), path
            assert not re.search(r"(AKIA|ASIA)[A-Z0-9]{16}|gd_\w{20}", text), path
