"""What the service answers, as its clients read it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

WELCOME = "Welcome to the Guns Object Detection API!"
DISCLAIMER = (
    "Unreviewed: a model's guess, which may be wrong either way. A person has to look before "
    "anything follows from it."
)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Welcome(_Answer):
    message: str = WELCOME


class Detection(_Answer):
    """`box` is x1, y1, x2, y2 in pixels of the upright picture (EXIF orientation applied)."""

    box: list[float] = Field(min_length=4, max_length=4, examples=[[12.5, 40.0, 310.2, 220.9]])
    score: float = Field(ge=0, le=1, examples=[0.94])


class Timings(_Answer):
    """Milliseconds: until the picture was decoded, until it was looked at, and of all."""

    decode: float
    wait_and_inference: float
    inference: float
    total: float


class Prediction(_Answer):
    """What one model version sees in one picture, best first, at or above `threshold`."""

    detections: list[Detection]
    threshold: float = Field(ge=0, le=1)
    model: str = Field(examples=["mobilenet-v2-fpn-0a1b2c3d4e5f"])
    engine: str = Field(examples=["openvino-int8"])
    width: int
    height: int
    review: Literal["unreviewed"] = "unreviewed"
    disclaimer: str = DISCLAIMER
    timings_ms: Timings
    stored_as: str | None = Field(None, description="Where the picture lies, if it was stored.")


class Failure(_Answer):
    """Why there is no answer: `reason` is a stable code, `message` says what to do."""

    reason: str = Field(examples=["NOT_IMAGE"])
    message: str


class ErrorAnswer(_Answer):
    error: Failure


class BatchItem(_Answer):
    """One picture of a batch: either `prediction` or `error`."""

    name: str
    prediction: Prediction | None = None
    error: Failure | None = None


class BatchPrediction(_Answer):
    """In the order of the files; all are answered by the same model version."""

    model: str
    threshold: float
    review: Literal["unreviewed"] = "unreviewed"
    disclaimer: str = DISCLAIMER
    images: list[BatchItem]


class ModelCard(_Answer):
    """The model version that answers now."""

    model: str
    architecture: str
    threshold: float
    engine: str
    device: str
    input_size: list[int] = Field(
        min_length=2, max_length=2, description="Shorter and longest side, pixels."
    )
    score_floor: float = Field(description="Lowest score that is ever answered.")
    source: Literal["champion", "file"]
    dataset: str | None
    loaded_at: str
    stores: Literal["never", "asked", "always"] = Field(description="Whether pictures are kept.")
    stale: str | None = Field(
        None, description="Why a newer champion is not served yet, if there is one."
    )


class Health(_Answer):
    status: Literal["ok"] = "ok"


class Readiness(_Answer):
    ready: Literal[True] = True
    model: str
