"""TensorBoard as a service."""

from embedded.config import HOST, Platform
from embedded.environment import program_folder
from embedded.processes import Service


def tensorboard_service(platform: Platform, environment: dict[str, str]) -> Service:
    """Shows the runs below the library's home folder."""
    folder = platform.library_home / "tensorboard"
    folder.mkdir(mode=0o700, exist_ok=True)
    options = {
        "logdir": folder,
        "host": HOST,
        "port": platform.ports.tensorboard,
        "reload_interval": 10,
        # The fast loader is a second server on a port of its own choice.
        "load_fast": "false",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return Service(
        name="tensorboard",
        command=(str(program_folder() / "tensorboard"), *arguments),
        environment=environment,
        ports=("tensorboard",),
    )
