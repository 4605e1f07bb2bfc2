"""What all pages inside the Airflow UI share: their frame, and how they write things."""

from datetime import datetime

from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape

from gun_detection.text import printable

BASE = "/gun-detection"

_LONGEST = 160


def environment(package: str) -> Environment:
    """The templates of a package, in the frame that all pages share."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("gun_detection")]),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"base": BASE, "time": format_time}
    made.filters |= {"count": format_count, "size": format_size, "visible": visible}
    return made


def format_time(value: datetime) -> str:
    return f"{value:%Y-%m-%d %H:%M} UTC"


def format_count(value: int) -> str:
    return f"{value:,}"


def format_size(value: float) -> str:
    """Bytes, as people read them."""
    megabytes = value / 2**20
    return f"{megabytes:,.1f} MB" if megabytes < 1000 else f"{megabytes / 1024:,.1f} GB"


def visible(value: str) -> str:
    """Text from outside on one line; a long one loses its middle."""
    shown = printable(value)
    if len(shown) <= _LONGEST:
        return shown
    half = _LONGEST // 2
    return f"{shown[:half]} … {shown[-half:]}"
