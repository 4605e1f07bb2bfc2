"""What waits for the next run although it has an outcome."""

from sqlalchemy import TextClause, text


def judged_anew(which: str, *, deferred: bool = False) -> TextClause:
    """A statement that has the next run judge uploads anew, `deferred` after all others; it returns
    how many there are.

    `which` is the SQL condition for an outcome `l` of a current upload `u`; ids are to be asked of
    `l`, by which they are looked up. What an upload has now stays until then, and the count of
    tries goes on.
    """
    # Locked, and looked at again where a listing has changed it meanwhile: no former version waits.
    return text(
        f"""
        WITH again AS (
            UPDATE ledger l SET stale = true FROM upload u
            WHERE u.id = l.upload_id AND u.current AND {which}
            RETURNING l.upload_id
        ), waiting AS (
            INSERT INTO pending_upload AS p (upload_id, bucket, key, size, uploaded_at, deferred)
            SELECT id, bucket, key, size, uploaded_at, {str(deferred).lower()} FROM upload
            WHERE id = ANY(ARRAY(SELECT upload_id FROM again)) AND current
            FOR SHARE
            ON CONFLICT (upload_id) DO UPDATE SET deferred = p.deferred OR excluded.deferred
        )
        SELECT COUNT(DISTINCT upload_id) FROM again
        """
    )
