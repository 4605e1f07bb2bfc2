"""Keep when each source was last looked at for new uploads, and why it could not be."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "source_look",
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("looked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("message", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("source", name=op.f("pk_source_look")),
    )
    # A large bucket takes half an hour to list, after which there is a pause of five minutes.
    op.execute(
        """
        CREATE VIEW unseen_sources AS
        SELECT source, looked_at, EXTRACT(EPOCH FROM now() - looked_at)::float AS seconds, message
        FROM source_look
        WHERE message IS NOT NULL OR looked_at < now() - interval '1 hour'
        """
    )
