"""The one error tree.

    GunDetectionError
    ├── TransientError          may succeed when tried again: Airflow retries it
    │   ├── ServiceUnavailableError   a server is down, throttles or breaks the connection
    │   └── StaleAttemptError         another attempt holds the lease of this work
    └── TerminalError           fails in the same way again: says what to do instead
        ├── SettingsError             a setting is missing, unknown or contradictory
        ├── SchemaError               the database is behind (or ahead of) the code
        ├── NotFoundError             a bucket, object, file, data set or model is not there
        ├── ImageError                this picture cannot be used (the reason says why)
        ├── LabelError                this label cannot be used
        ├── DatasetError              the data set as a whole cannot be used
        ├── ModelError                weights or their description cannot be used
        ├── TrainingError             training cannot go on
        ├── ReleaseError              a gate, promotion or rollback cannot be done
        └── FailureBudgetError        a run finished, and too much of it failed

Every error carries `reason`, a stable upper-case code for rows, logs and alerts.
"""

import errno


class GunDetectionError(Exception):
    """Base of all errors that this package raises on purpose.

    `message` is one line for a person and says what to do; `reason` is a stable code.
    """

    default_reason = "ERROR"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.reason))


def _rebuild(kind: type[GunDetectionError], message: str, reason: str) -> GunDetectionError:
    return kind(message, reason=reason)


class TransientError(GunDetectionError):
    """May succeed when tried again."""

    default_reason = "TRANSIENT"


class ServiceUnavailableError(TransientError):
    default_reason = "SERVICE_UNAVAILABLE"


class StaleAttemptError(TransientError):
    default_reason = "STALE_ATTEMPT"


class TerminalError(GunDetectionError):
    """Fails again in the same way; a person has to change something."""

    default_reason = "TERMINAL"


class SettingsError(TerminalError):
    default_reason = "SETTINGS"


class SchemaError(TerminalError):
    default_reason = "SCHEMA_MISMATCH"


class NotFoundError(TerminalError):
    default_reason = "NOT_FOUND"


class ImageError(TerminalError):
    default_reason = "NOT_IMAGE"


class LabelError(TerminalError):
    default_reason = "BAD_LABEL"


class DatasetError(TerminalError):
    default_reason = "BAD_DATASET"


class ModelError(TerminalError):
    default_reason = "BAD_MODEL"


class TrainingError(TerminalError):
    default_reason = "TRAINING_FAILED"


class ReleaseError(TerminalError):
    default_reason = "RELEASE_REFUSED"


class FailureBudgetError(TerminalError):
    default_reason = "FAILURE_BUDGET"


def explain_os_error(error: OSError) -> str:
    """One line for a person: the system's own words, and what to do about a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some space and do this again; what was stored stays"
    return str(error)
