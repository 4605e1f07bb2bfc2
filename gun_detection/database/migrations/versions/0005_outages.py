"""Go on after outages where listings ended, keep what was found in pictures that are gone, and do
not wait for uploads that no source covers any more."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "source_listing",
        sa.Column("bucket", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("listed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("bucket", "prefix", name=op.f("pk_source_listing")),
    )
    op.add_column(
        "upload",
        sa.Column("wanted", sa.Boolean(), server_default=sa.text("true"), nullable=False),
    )
    for statement in _VIEWS:
        op.execute(statement)


# That a picture is gone says nothing about what an earlier model found in it.
_FIRST = """
    outcome = 'quarantined' AND reason IN ('OBJECT_MISSING', 'OBJECT_CHANGED'),
    model_id = c.model_id DESC, id DESC
"""
# Columns of the views are a contract with integrators: they are added to, never changed.
_VIEWS = [
    """
    CREATE OR REPLACE VIEW unscored_uploads AS
    SELECT id AS upload_id, bucket, key, etag, size, uploaded_at, first_seen_at
    FROM upload WHERE current AND pending AND wanted
    """,
    # By the champion; until it has looked at an upload, by whoever did last.
    f"""
    CREATE OR REPLACE VIEW current_outcomes AS
    SELECT u.upload_id, u.bucket, u.key, u.etag, u.uploaded_at, l.model_id, l.run_id,
           l.outcome, l.reason, l.message, l.sha256, l.width, l.height, l.created_at AS scored_at,
           l.id AS ledger_id, l.model_id = c.model_id AS by_champion, l.tries, l.engine
    FROM current_uploads u
    CROSS JOIN current_champion c
    JOIN LATERAL (
        SELECT * FROM ledger WHERE upload_id = u.upload_id ORDER BY {_FIRST} LIMIT 1
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
        SELECT * FROM ledger WHERE upload_id = u.id ORDER BY {_FIRST} LIMIT 1
    ) l ON l.reason IS NOT NULL
    """,
]
