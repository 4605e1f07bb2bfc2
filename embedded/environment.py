"""The environment of the services and of the shell that `python -m embedded env` prepares."""

import json
import os
import sys
from pathlib import Path

from embedded.config import HOST, REPOSITORY, USERS, Platform, write_private
from embedded.postgres import PostgresServer
from gun_detection.settings import PREFIX

AIRFLOW_DATABASE = "airflow"
LIBRARY_DATABASE = "gun_detection"
DATA_BUCKET = "gun-detection-data"
UPLOADS_BUCKET = "uploads"

# What the services take over from the shell that called `up`, beside settings of their own.
_PASSED_PREFIXES = (PREFIX, "AIRFLOW_CONN_", "AIRFLOW_VAR_", "AIRFLOW__", "KAGGLE_", "CUDA_")
_PASSED_NAMES = (
    "ALL_PROXY",
    "HOME",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LANG",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "USER",
    "all_proxy",
    "http_proxy",
    "https_proxy",
)
_DIRECT = (HOST, "localhost")


def library_environment(platform: Platform, server: PostgresServer) -> dict[str, str]:
    """The settings of `gun_detection` that the platform owns."""
    credentials = platform.credentials
    values = {
        "HOME": str(platform.library_home),
        "DATABASE_URL": server.url(
            LIBRARY_DATABASE, LIBRARY_DATABASE, credentials.library_database_password
        ),
        "S3_ENDPOINT_URL": platform.s3_url,
        "S3_ACCESS_KEY_ID": credentials.s3_access_key_id,
        "S3_SECRET_ACCESS_KEY": credentials.s3_secret_access_key,
        "DATA_BUCKET": DATA_BUCKET,
        "UPLOADS_BUCKET": UPLOADS_BUCKET,
        "PUBLIC_URL": platform.airflow_url,
        "TENSORBOARD_URL": platform.tensorboard_url,
        "SINCE": credentials.since,
    }
    return {PREFIX + name: value for name, value in values.items()}


def airflow_environment(platform: Platform, server: PostgresServer) -> dict[str, str]:
    """Airflow's configuration; `AIRFLOW__SECTION__KEY` wins over any file."""
    credentials = platform.credentials
    database = server.url(AIRFLOW_DATABASE, AIRFLOW_DATABASE, credentials.airflow_database_password)
    values = {
        "CORE__DAGS_FOLDER": REPOSITORY / "dags",
        "CORE__PLUGINS_FOLDER": REPOSITORY / "plugins",
        "CORE__LOAD_EXAMPLES": False,
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": False,
        "CORE__TEST_CONNECTION": "Disabled",
        "CORE__FERNET_KEY": credentials.fernet_key,
        "CORE__EXECUTOR": "LocalExecutor",
        # The executor forks this many workers at its start: for all shards, a training, another.
        "CORE__PARALLELISM": max(4, _scoring_tasks() + 2),
        "CORE__HOSTNAME_CALLABLE": "embedded.config.host_name",
        "CORE__EXECUTION_API_SERVER_URL": f"{platform.airflow_url}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(":".join(user) for user in USERS.items()),
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": platform.airflow_home / "passwords.json",
        "CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": 5,
        "DATABASE__SQL_ALCHEMY_CONN": database,
        "API__HOST": HOST,
        "API__PORT": platform.ports.airflow,
        "API__BASE_URL": platform.airflow_url,
        "API__SECRET_KEY": credentials.api_secret_key,
        "API_AUTH__JWT_SECRET": credentials.jwt_secret,
        # A killed task is noticed within a minute, and tasks of a killed scheduler as well.
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": 60,
        "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": 30,
        # Running tasks outlive a restart of the API server, which takes some fifteen seconds.
        "WORKERS__EXECUTION_API_RETRIES": 12,
        "WORKERS__EXECUTION_API_RETRY_WAIT_MAX": 10,
        "DAG_PROCESSOR__REFRESH_INTERVAL": 10,
        # A changed file is parsed at once; the others hardly change, and cost as much every time.
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": 120,
        "LOGGING__WORKER_LOG_SERVER_PORT": platform.ports.airflow_logs,
        "LOGGING__TRIGGER_LOG_SERVER_PORT": platform.ports.airflow_logs,
        "LOGGING__COLORED_CONSOLE_LOG": False,
        "USAGE_DATA_COLLECTION__ENABLED": False,
    }
    environment = {f"AIRFLOW__{name}": str(value) for name, value in values.items()}
    return environment | {
        "AIRFLOW_HOME": str(platform.airflow_home),
        # Process titles would overwrite the environment, by which left processes are found.
        "SPT_NOENV": "1",
    }


def _scoring_tasks() -> int:
    # `up` refuses a wrong number, and whatever stops the platform or shows it does without.
    given = os.environ.get(f"{PREFIX}SCORING_TASKS", "")
    return int(given) if given.isdecimal() else 0


def owned_environment(platform: Platform, server: PostgresServer) -> dict[str, str]:
    """Every variable that the platform sets itself, for Airflow and the library."""
    return library_environment(platform, server) | airflow_environment(platform, server)


def service_environment(platform: Platform, server: PostgresServer) -> dict[str, str]:
    """All that Airflow's components, its tasks and TensorBoard see."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_NAMES or name.startswith(_PASSED_PREFIXES)
        # What SOCKS needs is not installed: Airflow's clients would fail, even for this machine.
        if not (name.upper() == "ALL_PROXY" and value.startswith("socks"))
    }
    path = os.pathsep.join([str(program_folder()), "/usr/local/bin", "/usr/bin", "/bin"])
    return passed | direct_addresses() | {"PATH": path} | owned_environment(platform, server)


def given_settings(platform: Platform) -> dict[str, str]:
    """The settings of `gun_detection` that the services had at the last start; none before it."""
    description = platform.services / "scheduler.json"
    if not description.exists():
        return {}
    environment: dict[str, str] = json.loads(description.read_text())["environment"]
    return {name: value for name, value in environment.items() if name.startswith(PREFIX)}


def direct_addresses() -> dict[str, str]:
    """`NO_PROXY` with this machine in it: a proxy for the internet is none for our own servers."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in given.split(",") if name.strip()]
    # A star means everything, but only where it stands alone.
    if names != ["*"]:
        names += [name for name in _DIRECT if name not in names]
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(names))


def program_folder() -> Path:
    """Where the programs of this environment are."""
    return Path(sys.executable).parent


def write_passwords(platform: Platform) -> None:
    """Give Airflow's sign-in the passwords that were made with the platform."""
    path = platform.airflow_home / "passwords.json"
    write_private(path, json.dumps(platform.credentials.passwords))
