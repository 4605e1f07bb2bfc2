"""Show what the champion before said, and no model that was rolled back, until the present one has
looked."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in _VIEWS:
        op.execute(statement)


# The place of a model among all champions, by when each was it last: the present one is the first.
# Those that never were have none, and NULL comes last.
_PLACE = """
    array_position(
        ARRAY(SELECT p.model_id FROM promotion p GROUP BY p.model_id ORDER BY MAX(p.id) DESC),
        model_id
    )
"""
# Columns of the views are a contract with integrators: they are added to, never changed.
_VIEWS = [
    # That a model could not look at a picture says nothing about what an earlier one found in it.
    f"""
    CREATE OR REPLACE VIEW current_outcomes AS
    SELECT u.upload_id, u.bucket, u.key, u.etag, u.uploaded_at, l.model_id, l.run_id,
           l.outcome, l.reason, l.message, l.sha256, l.width, l.height, l.created_at AS scored_at,
           l.id AS ledger_id, l.model_id = c.model_id AS by_champion, l.tries, l.engine
    FROM current_uploads u
    CROSS JOIN current_champion c
    JOIN LATERAL (
        SELECT * FROM ledger WHERE upload_id = u.upload_id
        ORDER BY outcome = 'quarantined', {_PLACE}, id DESC LIMIT 1
    ) l ON true
    """,
    f"""
    CREATE OR REPLACE VIEW quarantine AS
    SELECT u.bucket, u.key, u.etag, l.sha256, l.reason, l.message, l.tries,
           u.first_seen_at, l.created_at AS scored_at, l.run_id, l.model_id,
           u.id AS upload_id, l.id AS ledger_id
    FROM current_champion c
    CROSS JOIN (SELECT DISTINCT upload_id FROM ledger WHERE reason IS NOT NULL) q
    JOIN upload u ON u.id = q.upload_id AND u.current
    JOIN LATERAL (
        SELECT * FROM ledger WHERE upload_id = u.id
        ORDER BY outcome = 'quarantined' AND reason IN ('OBJECT_MISSING', 'OBJECT_CHANGED'),
                 {_PLACE}, id DESC LIMIT 1
    ) l ON l.reason IS NOT NULL
    """,
]
