"""What the services and the shell get of the environment that called."""

import pytest

from embedded.config import load_platform
from embedded.environment import direct_addresses
from embedded.stack import Stack

OURS = "127.0.0.1,localhost"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, OURS),
        ({"NO_PROXY": "corp.example"}, f"corp.example,{OURS}"),
        ({"no_proxy": "corp.example, 10.0.0.0/8"}, f"corp.example,10.0.0.0/8,{OURS}"),
        # As curl and Python, which ask the small name first.
        ({"NO_PROXY": "big.example", "no_proxy": "small.example"}, f"small.example,{OURS}"),
        ({"NO_PROXY": "*"}, "*"),
        ({"no_proxy": "localhost,corp.example"}, "localhost,corp.example,127.0.0.1"),
    ],
)
def test_this_machine_needs_no_proxy(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = direct_addresses()
    assert found["NO_PROXY"] == found["no_proxy"]
    assert found["NO_PROXY"] == expected
    # Otherwise a second `up` from the prepared shell would start everything again.
    monkeypatch.setenv("no_proxy", found["no_proxy"])
    assert direct_addresses() == found


@pytest.mark.usefixtures("directory")
def test_services_get_the_proxies_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "corp.example")
    monkeypatch.setenv("all_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.example:1080")
    environment = Stack(load_platform()).environment
    assert environment["NO_PROXY"] == environment["no_proxy"] == f"corp.example,{OURS}"
    assert environment["all_proxy"] == "http://proxy.example:3128"
    # httpx cannot even begin with it.
    assert "ALL_PROXY" not in environment


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    ("given", "expected"), [(None, "4"), ("1", "4"), ("8", "10"), ("many", "4")]
)
def test_all_shards_at_once_have_a_worker(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GUN_DETECTION_SCORING_TASKS", raising=False)
    if given is not None:
        monkeypatch.setenv("GUN_DETECTION_SCORING_TASKS", given)
    # A wrong number stops no `down`: it is for `up` to refuse.
    assert Stack(load_platform()).environment["AIRFLOW__CORE__PARALLELISM"] == expected
