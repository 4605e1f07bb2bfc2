"""A policy of the gate: a list of rules in a YAML file, checked whole before it is used."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gun_detection.errors import SettingsError
from gun_detection.release.rules import Rule

NAMES = ("standard", "trial")


class Policy(BaseModel):
    """The rules that a candidate has to pass, all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rules: tuple[Rule, ...] = Field(min_length=1)

    @property
    def version(self) -> str:
        """Of the rules, whatever the file is called; stored with each decision."""
        content = json.dumps([rule.model_dump(mode="json") for rule in self.rules], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @classmethod
    def parse(cls, name: str, text: str) -> Self:
        """Raises `SettingsError` that names the rule and the value at fault."""
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            line = f" in line {where.line + 1}" if where else ""
            raise SettingsError(f"gate policy {name}: this is not YAML{line}") from None
        if not isinstance(content, dict):
            raise SettingsError(f"gate policy {name}: write `rules:` and a list of rules")
        try:
            return cls.model_validate(content | {"name": name})
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SettingsError(f"gate policy {name}: {where}: {first['msg']}") from None


def load_policy(name: str) -> Policy:
    """The policy of this name, or of a YAML file; raises `SettingsError`."""
    if name in NAMES:
        text = (files("gun_detection.release") / "policies" / f"{name}.yaml").read_text()
        return Policy.parse(name, text)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise SettingsError(
            f"there is no gate policy {name!r}: choose from {', '.join(NAMES)}, "
            "or give the path of a .yaml file"
        )
    try:
        return Policy.parse(path.name, path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"gate policy {name} cannot be read ({error})") from error
