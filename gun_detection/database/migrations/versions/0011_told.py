"""Keep when the uploads of each bucket were last told of, so that what failed is told of again."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("upload_watch", sa.Column("told_at", sa.DateTime(timezone=True), nullable=True))
