"""The files of the production shape, checked without a container engine."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedded.config import REPOSITORY
from gun_detection.settings import PREFIX, Settings, load_settings

COMPOSE = REPOSITORY / "docker-compose.yaml"
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
PROGRAMS = Path(sys.executable).parent
ONE_SHOT = {"airflow-init"}
PROFILES = "gpu,serving,serving-gpu"
Compose = Callable[..., "subprocess.CompletedProcess[str]"]
SECRETS = (
    "POSTGRES_PASSWORD",
    "AIRFLOW_DB_PASSWORD",
    "LIBRARY_DB_PASSWORD",
    "BROKER_PASSWORD",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
    "AIRFLOW_SECRET_KEY",
    "AIRFLOW_JWT_SECRET",
    "FERNET_KEY",
)


def variables(project: Path) -> dict[str, str]:
    lines = (project / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match("[A-Z]", line))


def test_all_services_are_there(services: dict[str, Any]) -> None:
    assert set(services) == {
        "airflow-api-server",
        "airflow-dag-processor",
        "airflow-init",
        "airflow-scheduler",
        "airflow-triggerer",
        "postgres",
        "predict",
        "predict-gpu",
        "seaweedfs",
        "tensorboard",
        "valkey",
        "worker",
        "worker-gpu",
    }


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_missing_secret_is_refused_by_its_name(
    project: Path, compose: Compose, tmp_path: Path, name: str, value: str | None
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    values = {**variables(project), name: value}
    lines = [f"{key}={text}" for key, text in values.items() if text is not None]
    (tmp_path / ".env").write_text("\n".join(lines))
    result = compose(tmp_path, "config", "--quiet", COMPOSE_PROFILES=PROFILES)
    assert result.returncode != 0
    assert f"set {name} in .env" in result.stderr


def test_generated_secrets_are_private_different_and_kept(project: Path) -> None:
    values = variables(project)
    secrets = [values[name] for name in SECRETS]
    assert len(set(secrets)) == len(SECRETS)
    assert min(map(len, secrets)) >= 44
    assert (project / ".env").stat().st_mode & 0o777 == 0o600
    since = load_settings({"GUN_DETECTION_SINCE": values["SINCE"]}).since
    assert since is not None
    assert timedelta(0) <= datetime.now(UTC) - since < timedelta(minutes=10)
    script = ["sh", project / "docker" / "generate-env.sh"]
    again = subprocess.run(script, capture_output=True, check=False)
    assert again.returncode == 1
    assert variables(project) == values


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nexit 1\n"], ids=["missing", "failing"])
def test_without_openssl_no_file_is_made(tmp_path: Path, program: str | None) -> None:
    (tmp_path / "docker").mkdir()
    for name in (".env.example", "docker/generate-env.sh"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "dirname", "mv", "rm", "tr"):
        (programs / name).symlink_to(str(shutil.which(name)))
    if program is not None:
        (programs / "openssl").write_text(program)
        (programs / "openssl").chmod(0o755)
    result = subprocess.run(
        [programs / "sh", tmp_path / "docker" / "generate-env.sh"],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert ("is not installed" in result.stderr) == (program is None)
    assert [path.name for path in tmp_path.glob(".env*")] == [".env.example"]


def test_no_secret_is_written_down() -> None:
    example = (REPOSITORY / ".env.example").read_text()
    assert all(re.search(f"^{name}=$", example, re.MULTILINE) for name in SECRETS)
    for file in (COMPOSE, *DOCKERFILES):
        for line in file.read_text().splitlines():
            if re.search("(PASSWORD|SECRET|FERNET)[A-Z_]*:", line.partition("${")[0]):
                assert ":?" in line, f"{file.name}: {line}"


def test_every_service_that_runs_on_has_a_healthcheck(services: dict[str, Any]) -> None:
    assert {name for name, service in services.items() if "healthcheck" not in service} == ONE_SHOT


def test_no_service_runs_as_root_or_can_become_it(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["user"] not in ("", "root", "0", "0:0"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_only_what_people_and_clients_call_is_published_and_only_here(
    services: dict[str, Any],
) -> None:
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert ports == {
        "airflow-api-server": ["127.0.0.1:8080:8080/tcp"],
        "predict": ["127.0.0.1:8000:8000/tcp"],
        "predict-gpu": ["127.0.0.1:8000:8000/tcp"],
        "tensorboard": ["127.0.0.1:6006:6006/tcp"],
    }


def test_published_address_is_a_setting(project: Path, compose: Compose) -> None:
    moved = {"AIRFLOW_PORT": "9090", "PREDICT_PORT": "9000", "COMPOSE_PROFILES": "serving"}
    result = compose(project, "config", BIND_ADDRESS="192.0.2.7", **moved)
    assert "192.0.2.7:9090:8080/tcp" in result.stdout
    assert "192.0.2.7:6006:6006/tcp" in result.stdout
    assert "192.0.2.7:9000:8000/tcp" in result.stdout


def test_data_services_have_no_way_out(configuration: dict[str, Any]) -> None:
    assert configuration["networks"]["data"]["internal"] is True
    for name in ("postgres", "valkey", "seaweedfs"):
        assert list(configuration["services"][name]["networks"]) == ["data"]


def test_images_are_pinned_and_none_is_minio(services: dict[str, Any]) -> None:
    for service in services.values():
        image, _, tag = service["image"].rpartition(":")
        assert re.match(r"\d+\.\d+", tag), service["image"]
        assert "minio" not in image


def test_library_settings_are_known_and_valid(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, service in services.items():
        environment = service.get("environment", {})
        given = {key: value for key, value in environment.items() if key.startswith(PREFIX)}
        assert set(given) <= known, name
        for variable, value in given.items():
            monkeypatch.setenv(variable, value)
    assert Settings().s3_endpoint_url == "http://seaweedfs:8333"


def test_queue_for_the_gpu_is_served_with_and_without_one(
    project: Path, compose: Compose, services: dict[str, Any]
) -> None:
    def served(service: dict[str, Any], option: str = "--queues") -> str:
        command = service["command"]
        return str(command[command.index(option) + 1])

    assert served(services["worker"]) == "default,gpu"
    assert served(services["worker-gpu"]) == "gpu"
    assert served(services["worker-gpu"], "--concurrency") == "1"
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    given = {"WORKER_QUEUES": "default", "GPU_CONCURRENCY": "4", "COMPOSE_PROFILES": "gpu"}
    plain = yaml.safe_load(compose(project, "config", **given).stdout)["services"]
    assert served(plain["worker"]) == "default"
    assert served(plain["worker-gpu"], "--concurrency") == "4"


def test_tasks_outlive_a_full_worker_and_an_api_server_that_starts_again(
    services: dict[str, Any],
) -> None:
    airflow = [one for name, one in services.items() if re.match("airflow-|worker", name)]
    assert len(airflow) == 7
    for service in airflow:
        given = service["environment"]
        # As long as a training may take: whatever waits for its slot fails after three times that.
        assert given["AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT"] == "86400"
        assert int(given["AIRFLOW__WORKERS__EXECUTION_API_RETRIES"]) > 5
        # The workers are the limit, and no number of tasks over all of them.
        assert int(given["AIRFLOW__CORE__PARALLELISM"]) == 128


def test_what_not_everyone_needs_runs_only_where_it_is_asked_for(services: dict[str, Any]) -> None:
    asked = {name: one["profiles"] for name, one in services.items() if "profiles" in one}
    assert asked == {
        "predict": ["serving"],
        "predict-gpu": ["serving-gpu"],
        "worker-gpu": ["gpu"],
    }


def test_predict_service_can_write_to_its_own_volume_only(
    services: dict[str, Any], configuration: dict[str, Any]
) -> None:
    for name in ("predict", "predict-gpu"):
        service = services[name]
        assert service["read_only"] is True
        assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
        writable = [mount for mount in service["volumes"] if not mount.endswith(":ro")]
        assert writable == ["predict:/var/lib/gun-detection:rw"]
        assert service["deploy"]["resources"]["limits"] == {"cpus": 2.0, "memory": "4g"}
        # Time for requests under way, of which the service allows 30 s.
        assert service["stop_grace_period"] == "60s"
    others = [name for name in services if not name.startswith("predict")]
    assert not [name for name in others if "predict:" in str(services[name].get("volumes"))]


def test_predict_service_gets_a_gpu_and_the_image_with_cuda_for_it(
    project: Path, compose: Compose
) -> None:
    environment = {"TORCH_CPU_INDEX": "https://cpu.example.org/", "COMPOSE_PROFILES": PROFILES}
    services = yaml.safe_load(compose(project, "config", **environment).stdout)["services"]
    assert services["predict"]["build"]["args"] == {"TORCH_CPU_INDEX": "https://cpu.example.org/"}
    assert "args" not in services["predict-gpu"]["build"]
    assert services["predict"]["image"] != services["predict-gpu"]["image"]
    reserved = services["predict-gpu"]["deploy"]["resources"]["reservations"]
    assert reserved == services["worker-gpu"]["deploy"]["resources"]["reservations"]


def test_api_keys_are_taken_over_and_may_be_missing(project: Path, compose: Compose) -> None:
    entry = "door:predict:never:" + "0" * 64
    for given, expected in (({}, ""), ({"SERVE_KEYS": f"{entry} {entry}"}, f"{entry} {entry}")):
        result = compose(project, "config", COMPOSE_PROFILES="serving", **given)
        environment = yaml.safe_load(result.stdout)["services"]["predict"]["environment"]
        assert environment["GUN_DETECTION_SERVE_KEYS"] == expected
    # An empty line would get a random secret, which is no entry.
    assert "SERVE_KEYS" not in variables(project)


def test_airflow_believes_the_proxy_that_is_named(
    project: Path, compose: Compose, services: dict[str, Any]
) -> None:
    server = services["airflow-api-server"]
    assert "--proxy-headers" in server["command"]
    assert server["environment"]["FORWARDED_ALLOW_IPS"] == "127.0.0.1"
    result = compose(project, "config", AIRFLOW_TRUSTED_PROXIES="192.0.2.1")
    named = yaml.safe_load(result.stdout)["services"]["airflow-api-server"]["environment"]
    assert named == server["environment"] | {"FORWARDED_ALLOW_IPS": "192.0.2.1"}
    # An empty line would get a random secret, which is no address.
    assert "AIRFLOW_TRUSTED_PROXIES" not in variables(project)


def test_every_mounted_or_copied_file_exists(services: dict[str, Any], project: Path) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("/") or Path(source).is_relative_to(project)
            assert not source.startswith("/") or Path(source).exists()
    for file in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", file.read_text(), re.M):
            assert all((REPOSITORY / source).exists() for source in line.split()), line


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_is_clean(path: Path) -> None:
    command = [PROGRAMS / "hadolint", "--no-color", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_pinned_checked_and_not_root(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"python:3.11.14-slim-bookworm"}
    assert re.findall(r"^USER (.+)$", text, re.M) == ["50000:50000"]
    for installation in re.findall(r"pip install (?:.*\\\n)*.*", text):
        assert "--require-hashes" in installation or "--no-index" in installation


def test_airflow_image_has_no_torch_all_executors_and_agrees_with_the_worker() -> None:
    def versions(name: str) -> dict[str, str]:
        lines = (REPOSITORY / name).read_text()
        return dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", lines, re.M))

    airflow = versions("docker/requirements-airflow.txt")
    worker = versions("docker/requirements-worker.txt")
    assert "torch" not in airflow
    assert not [name for name in airflow if name.startswith("nvidia")]
    assert {k: worker.get(k) for k in airflow} == airflow
    # What docs/deployment.md says may be turned on.
    executors = {"apache-airflow-providers-celery", "apache-airflow-providers-cncf-kubernetes"}
    assert executors | {"statsd"} <= airflow.keys()
    assert "--index-url" not in (REPOSITORY / "docker/requirements-airflow.txt").read_text()


def test_image_context_holds_no_secret() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert not {"!.env", "!.git", "!**"} & set(lines)


def test_settings_of_the_operator_reach_every_service_that_reads_them(
    project: Path, compose: Compose, tmp_path: Path
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "docker" / "config" / "settings.env").open("a") as file:
        file.write("GUN_DETECTION_RUN_IMAGES=17\nGUN_DETECTION_HOME=/elsewhere\n")
    result = compose(tmp_path, "config", COMPOSE_PROFILES=PROFILES)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    ours = [
        service for name, service in services.items() if re.match("airflow-|worker|predict", name)
    ]
    assert len(ours) == 9
    for service in ours:
        assert service["environment"]["GUN_DETECTION_RUN_IMAGES"] == "17"
        assert service["environment"]["GUN_DETECTION_HOME"] == "/var/lib/gun-detection"
        assert any(":/etc/gun-detection:ro" in volume for volume in service["volumes"])
