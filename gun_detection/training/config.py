"""What a training does, as one frozen object that is stored with the model."""

import hashlib
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gun_detection.detector.architectures import DetectorConfig
from gun_detection.errors import SettingsError
from gun_detection.settings import Settings


class TrainingConfig(BaseModel):
    """A recipe. The named ones are in `PRESETS`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: DetectorConfig = DetectorConfig()
    initial_weights: str = Field(
        "coco", description="`coco`, `imagenet`, `none`, or a file or S3 URI of weights."
    )
    epochs: int = Field(10, gt=0, description="Passes over the training images.")
    max_steps: int | None = Field(None, gt=0, description="Stop after so many steps.")
    batch_size: int = Field(8, gt=0, description="Pictures in a step.")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="Update rule.")
    learning_rate: float = Field(1e-3, gt=0, description="Rate after the warm-up.")
    weight_decay: float = Field(1e-4, ge=0, description="Decay of weights.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="How the rate goes on after the warm-up."
    )
    warmup_steps: int = Field(20, ge=0, description="Steps in which the rate rises from zero.")
    clip_norm: float | None = Field(10.0, gt=0, description="Largest norm of the gradient.")
    flip: bool = Field(True, description="Mirror every second picture.")
    brightness: float = Field(0.2, ge=0, lt=1, description="Largest relative change of brightness.")
    seed: int = Field(0, ge=0, description="Seed of weights, order and augmentation.")

    def hash(self) -> str:
        """The identity of the recipe: equal recipes, equal hash."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


PRESETS: dict[str, TrainingConfig] = {
    # Seconds: shows that everything fits together, learns nothing.
    "smoke": TrainingConfig(
        detector=DetectorConfig(architecture="resnet18_fpn", norm="trainable"),
        initial_weights="none",
        max_steps=4,
        epochs=1,
        warmup_steps=1,
    ),
    # Minutes on two cores, from nothing.
    "cpu": TrainingConfig(
        detector=DetectorConfig(architecture="resnet18_fpn", norm="trainable"),
        initial_weights="none",
        epochs=6,
    ),
    "gpu": TrainingConfig(
        detector=DetectorConfig(architecture="resnet50_fpn"),
        epochs=20,
        batch_size=8,
        learning_rate=1e-4,
        warmup_steps=100,
    ),
    # The well-known tutorial recipe, for comparison.
    "seed": TrainingConfig(
        detector=DetectorConfig(architecture="resnet50_fpn"),
        epochs=10,
        batch_size=3,
        optimizer="adam",
        learning_rate=1e-3,
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=0,
        clip_norm=None,
        flip=False,
        brightness=0.0,
    ),
}


def resolve_config(
    settings: Settings, preset: str | None = None, overrides: dict[str, Any] | None = None
) -> TrainingConfig:
    """A preset with the settings' and then the given overrides (`detector.max_size` style names).

    Raises `SettingsError` naming the value at fault.
    """
    name = preset or settings.training_preset
    if name not in PRESETS:
        raise SettingsError(f"unknown training preset {name!r}: choose from {', '.join(PRESETS)}")
    values = PRESETS[name].model_dump()
    changes: dict[str, Any] = {}
    if settings.architecture is not None:
        changes["detector.architecture"] = settings.architecture
    if settings.initial_weights is not None:
        changes["initial_weights"] = settings.initial_weights
    for key, value in (changes | (overrides or {})).items():
        target: Any = values
        *parents, last = key.split(".")
        for parent in parents:
            target = target.get(parent) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise SettingsError(f"unknown training value {key!r}: see `gun-detection train --help`")
        target[last] = value
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SettingsError(f"training value {where}: {first['msg']}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """(`key`, value) of `key=value`, the value read as YAML; raises `SettingsError`."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise SettingsError(f"{text!r} is not an override: write key=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise SettingsError(f"the value of {key} is not readable: {value!r}") from None
