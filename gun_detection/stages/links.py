"""Where people read what a stage made."""

from urllib.parse import quote

from gun_detection.settings import Settings


def report_url(settings: Settings, key: str) -> str:
    """Where people read a report that is stored under this key."""
    return f"{settings.public_url.rstrip('/')}/gun-detection/reports/{key}"


def tensorboard_url(settings: Settings, run: str) -> str | None:
    """Where people see a training run, if there is a TensorBoard."""
    if settings.tensorboard_url is None:
        return None
    return f"{settings.tensorboard_url.rstrip('/')}/?runFilter={run}#timeseries"


def decision_url(settings: Settings, decision_id: int) -> str:
    """Where people read what the gate said, and why."""
    return f"{settings.public_url.rstrip('/')}/gun-detection/decisions/{decision_id}"


def card_url(settings: Settings, model_id: str) -> str:
    """Where people read a model's card."""
    return f"{settings.public_url.rstrip('/')}/gun-detection/cards/{model_id}"


def run_url(settings: Settings, run_id: str) -> str:
    """Where people see what a scoring run did."""
    return f"{settings.public_url.rstrip('/')}/gun-detection/runs/{quote(run_id, safe='')}"
