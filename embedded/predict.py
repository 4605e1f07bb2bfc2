"""The predict service as a service of the platform."""

from embedded.config import HOST, Platform
from embedded.environment import program_folder
from embedded.processes import Service
from gun_detection.serving.keys import SCOPES, key_of
from gun_detection.settings import PREFIX


def predict_service(platform: Platform, environment: dict[str, str]) -> Service:
    """Answers with the champion; the platform's own key opens everything."""
    own = f"{PREFIX}SERVE_KEYS"
    entry = str(key_of(platform.credentials.predict_key, "platform", SCOPES))
    settings = {
        f"{PREFIX}SERVE_HOST": HOST,
        f"{PREFIX}SERVE_PORT": str(platform.ports.predict),
        own: f"{entry} {environment.get(own, '')}",
    }
    return Service(
        name="predict",
        command=(str(program_folder() / "gun-detection"), "serve"),
        environment=environment | settings,
        ports=("predict",),
        # Requests under way have half a minute to end.
        patience=40,
    )
