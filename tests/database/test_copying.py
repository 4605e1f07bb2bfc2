"""Rows that are copied arrive as they are, and a lost server is a reason to try again."""

from collections.abc import Callable

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from gun_detection.database import open_session
from gun_detection.database.copying import copy_arrays, copy_rows
from gun_detection.errors import ServiceUnavailableError
from gun_detection.settings import Settings


def test_arrays_arrive_exactly(session: Session) -> None:
    numbers = np.array([-(2**63), 0, 2**63 - 1])
    values = np.array([1 / 3, -0.0, 1e-300])
    session.execute(text("CREATE TEMP TABLE t (number bigint, value double precision)"))
    copy_arrays(session, "t", {"number": numbers, "value": values})
    stored = session.execute(text("SELECT number, value FROM t ORDER BY number")).all()
    assert [row.number for row in stored] == numbers.tolist()
    assert np.array([row.value for row in stored]).tobytes() == values.tobytes()


@pytest.mark.parametrize(
    "copy",
    [
        lambda session: copy_rows(session, "t", ["number"], [(1,)]),
        lambda session: copy_arrays(session, "t", {"number": np.array([1])}),
    ],
)
def test_a_full_disk_is_a_reason_to_try_again(
    session: Session, copy: Callable[[Session], object]
) -> None:
    for statement in (
        "CREATE TEMP TABLE t (number bigint)",
        "CREATE FUNCTION pg_temp.fill() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'no space left' USING ERRCODE = 'disk_full'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON t EXECUTE FUNCTION pg_temp.fill()",
    ):
        session.execute(text(statement))
    with pytest.raises(ServiceUnavailableError, match="no space left"):
        copy(session)
    session.rollback()


def test_a_lost_server_is_a_reason_to_try_again(settings: Settings, session: Session) -> None:
    def write() -> None:
        with open_session(settings) as lost:
            lost.execute(text("CREATE TEMP TABLE t (number bigint)"))
            pid = lost.scalar(text("SELECT pg_backend_pid()"))
            session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
            copy_rows(lost, "t", ["number"], [(1,)])

    with pytest.raises(ServiceUnavailableError):
        write()
