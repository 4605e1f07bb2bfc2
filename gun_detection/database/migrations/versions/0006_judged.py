"""Show what any model found rather than that the champion could not look, and score anew what is
only waited for."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in _VIEWS:
        op.execute(statement)


# Columns of the views are a contract with integrators: they are added to, never changed.
_VIEWS = [
    # That the champion could not look at a picture (it is gone, archived, denied, or too large for
    # this network) says nothing about what an earlier model found in it. Why it could not stands in
    # `quarantine`, unless the picture is gone.
    """
    CREATE OR REPLACE VIEW current_outcomes AS
    SELECT u.upload_id, u.bucket, u.key, u.etag, u.uploaded_at, l.model_id, l.run_id,
           l.outcome, l.reason, l.message, l.sha256, l.width, l.height, l.created_at AS scored_at,
           l.id AS ledger_id, l.model_id = c.model_id AS by_champion, l.tries, l.engine
    FROM current_uploads u
    CROSS JOIN current_champion c
    JOIN LATERAL (
        SELECT * FROM ledger WHERE upload_id = u.upload_id
        ORDER BY outcome = 'quarantined', model_id = c.model_id DESC, id DESC LIMIT 1
    ) l ON true
    """,
    # What a model was to judge anew before another one became champion, is to be when it is again.
    """
    CREATE OR REPLACE VIEW outdated_uploads AS
    SELECT u.id AS upload_id, u.bucket, u.key, u.etag, u.size, u.uploaded_at, u.first_seen_at
    FROM upload u CROSS JOIN current_champion c
    WHERE u.current AND NOT u.pending AND NOT EXISTS (
        SELECT FROM ledger l
        WHERE l.upload_id = u.id AND l.model_id = c.model_id AND NOT l.stale
    )
    """,
]
