"""Keep what waits in a table of its own, so that an outcome changes no row of an upload."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # At once, and not after a listing that is under way has read it and wants to change it.
    op.execute("LOCK TABLE upload IN ACCESS EXCLUSIVE MODE")
    op.create_table(
        "pending_upload",
        sa.Column("upload_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("bucket", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("uploaded_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("wanted", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("deferred", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["upload.id"], name=op.f("fk_pending_upload_upload_id")
        ),
        sa.PrimaryKeyConstraint("upload_id", name=op.f("pk_pending_upload")),
    )
    op.execute(
        """
        INSERT INTO pending_upload (upload_id, bucket, key, size, uploaded_at, wanted, deferred)
        SELECT id, bucket, key, size, uploaded_at, wanted, deferred FROM upload
        WHERE current AND pending
        """
    )
    op.create_index(
        op.f("ix_pending_upload_bucket"),
        "pending_upload",
        ["bucket", "deferred", "uploaded_at", "upload_id"],
    )
    for statement in _VIEWS:
        op.execute(statement)
    op.drop_index("ix_upload_pending", "upload")
    for name in ("pending", "wanted", "deferred"):
        op.drop_column("upload", name)


# Columns of the views are a contract with integrators: they are added to, never changed.
_VIEWS = [
    """
    CREATE OR REPLACE VIEW unscored_uploads AS
    SELECT u.id AS upload_id, u.bucket, u.key, u.etag, u.size, u.uploaded_at, u.first_seen_at
    FROM pending_upload p JOIN upload u ON u.id = p.upload_id WHERE p.wanted
    """,
    """
    CREATE OR REPLACE VIEW scoring_freshness AS
    SELECT bucket, COUNT(*) AS unscored, MIN(uploaded_at) AS oldest_upload,
           EXTRACT(EPOCH FROM now() - MIN(uploaded_at))::float AS oldest_seconds
    FROM pending_upload WHERE wanted GROUP BY bucket
    """,
    """
    CREATE OR REPLACE VIEW outdated_uploads AS
    SELECT u.id AS upload_id, u.bucket, u.key, u.etag, u.size, u.uploaded_at, u.first_seen_at
    FROM upload u CROSS JOIN current_champion c
    WHERE u.current AND NOT EXISTS (SELECT FROM pending_upload p WHERE p.upload_id = u.id)
    AND NOT EXISTS (
        SELECT FROM ledger l
        WHERE l.upload_id = u.id AND l.model_id = c.model_id AND NOT l.stale
    )
    """,
]
