"""The address of the database as people write it, and the URL that the library connects by."""

import re

from psycopg2 import ProgrammingError  # type: ignore[import-untyped]
from psycopg2.extensions import make_dsn  # type: ignore[import-untyped]
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from gun_detection.errors import SettingsError

# Both are valid where libpq reads them.
_BACKENDS = ("postgresql", "postgres")
# A server whose machine died without a word is known to be gone within a minute. By default the
# system asks an idle one after two hours for the first time. For a Unix socket they say nothing.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives": "1",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}
# Several hosts with a port each, as libpq reads them: what comes before, the list, the rest.
_HOST = r"[\w.-]+(?::\d+)?"
_SEVERAL_HOSTS = re.compile(
    rf"([\w+]+://(?:[^@]*@)?)({_HOST}(?:,{_HOST})+)((?:/[^@?]*)?(?:\?[^@]*)?)"
)


def parse_address(address: str) -> URL:
    """The URL, whatever driver it names: COPY needs ours. What it sets itself stays.

    Raises `SettingsError`, which says nothing of the address: where it is malformed, any part may
    be of the password.
    """
    hosts = []
    if several := _SEVERAL_HOSTS.fullmatch(address):
        # SQLAlchemy has them among the options.
        hosts = [("host", host) for host in several[2].split(",")]
        address = several[1] + (several[3] or "/")
    try:
        url = make_url(address).update_query_pairs(hosts, append=True)
    except (ArgumentError, ValueError):
        url = None
    # Of several, the last @ should be the one before the host.
    if (
        url is None
        or "@" in (url.host or "") + (url.database or "")
        or url.get_backend_name() not in _BACKENDS
    ):
        raise SettingsError(
            "GUN_DETECTION_DATABASE_URL cannot be read: write "
            "postgresql://user:password@host:port/database, with %40, %3A and %2F for any @, : "
            "and / in the password"
        ) from None
    options = " ".join([*url.normalized_query.get("options", ()), "-c timezone=UTC"])
    query = _DEFAULTS | dict(url.query) | {"options": options}
    url = url.set(drivername="postgresql+psycopg2", query=query)
    _check_options(url)
    return url


def _check_options(url: URL) -> None:
    """Raise `SettingsError` for what is of another driver, before it looks like a fault of ours."""
    try:
        make_dsn(**url.get_dialect()().create_connect_args(url)[1])
    except (ArgumentError, ProgrammingError):
        # Not which one: of a malformed address, it may be of the password.
        raise SettingsError(
            "GUN_DETECTION_DATABASE_URL has an option after its ? that PostgreSQL's own library "
            "does not know: write sslmode=require for asyncpg's ssl=require, say, and %3F for any "
            "? in the password"
        ) from None
