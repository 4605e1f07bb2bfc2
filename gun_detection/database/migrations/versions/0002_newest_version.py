"""Tell the newest version of a key by when it was last listed: overwritten bytes can come back."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE OR REPLACE VIEW current_uploads AS
        SELECT DISTINCT ON (bucket, key)
               id AS upload_id, bucket, key, etag, size, uploaded_at, first_seen_at
        FROM upload ORDER BY bucket, key, last_seen_at DESC, id DESC
        """
    )
