"""Alembic's entry point; the caller hands over its open connection."""

from alembic import context

from gun_detection.database.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
