"""Plan what was tried in vain, or is to be judged anew, after everything else."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "upload",
        sa.Column("deferred", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.execute(
        """
        UPDATE upload u SET deferred = true
        WHERE pending AND EXISTS (SELECT FROM ledger l WHERE l.upload_id = u.id)
        """
    )
    op.drop_index("ix_upload_pending", "upload")
    op.create_index(
        "ix_upload_pending",
        "upload",
        ["bucket", "deferred", "uploaded_at"],
        postgresql_where=sa.text("pending"),
    )
