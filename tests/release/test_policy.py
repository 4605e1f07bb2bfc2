from pathlib import Path

import pytest

from gun_detection.errors import SettingsError
from gun_detection.release.policy import NAMES, Policy, load_policy


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_in_the_package_is_valid_and_tries_the_stored_model(name: str) -> None:
    assert "stored_model" in {rule.kind for rule in load_policy(name).rules}


def test_the_version_is_of_the_rules_alone() -> None:
    text = "rules: [{kind: at_least, metric: ap50, limit: 0.3}]"
    first = Policy.parse("a", text)
    assert first.version == Policy.parse("b", "# a comment\n" + text).version
    assert first.version != Policy.parse("a", text.replace("0.3", "0.4")).version
    # What is stored with a decision gives the same policy again.
    assert Policy.model_validate(first.model_dump(mode="json")).version == first.version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "not YAML in line"),
        ("", "write `rules:`"),
        ("- a", "write `rules:`"),
        ("rules: []", "rules: Tuple should have at least 1 item"),
        ("rules: [{kind: luck}]", "rules.0: Input tag 'luck'"),
        ("rules: [{kind: at_least, metric: ap51, limit: 0}]", "rules.0.at_least.metric"),
        ("rules: [{kind: at_least, metric: ap50}]", "rules.0.at_least.limit: Field required"),
        ("rules: [{kind: at_least, metric: ap50, limit: .nan}]", "rules.0.at_least.limit"),
        ("rules: [{kind: stored_model, limitt: 1}]", "limitt: Extra inputs"),
        ("rules: [{kind: better, metric: ap50, confidence: 1}]", "confidence"),
        ("name: x\nversion: 2\nrules: [{kind: stored_model}]", "version: Extra inputs"),
        ("!!python/object/apply:os.system ['true']", "not YAML in line"),
    ],
)
def test_a_fault_is_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Policy.parse("mine", text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "strict.yaml"
    path.write_text("rules: [{kind: at_least, metric: ap50, limit: 0.9}]")
    assert load_policy(str(path)).name == "strict.yaml"
    for name, message in (
        (str(tmp_path / "none.yaml"), "cannot be read"),
        ("lenient", "choose from standard, trial"),
        ("/etc/passwd", "choose from standard, trial"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_policy(name)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="cannot be read"):
        load_policy(str(path))
