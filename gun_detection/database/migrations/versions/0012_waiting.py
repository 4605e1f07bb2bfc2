"""Keep since when an upload waits, so that what is judged anew does not look as old as it is."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "pending_upload",
        sa.Column(
            "waits_since", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False
        ),
    )
    op.execute("UPDATE pending_upload SET waits_since = uploaded_at")
    op.execute(
        """
        CREATE OR REPLACE VIEW scoring_freshness AS
        SELECT bucket, COUNT(*) AS unscored, MIN(waits_since) AS oldest_upload,
               EXTRACT(EPOCH FROM now() - MIN(waits_since))::float AS oldest_seconds
        FROM pending_upload WHERE wanted GROUP BY bucket
        """
    )
