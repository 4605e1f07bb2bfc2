"""Plan from what is pending, find pictures that kill, keep engines and the figures of runs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for view in (
        "scoring_summary",
        "unscored_uploads",
        "current_detections",
        "current_outcomes",
        "current_uploads",
    ):
        op.execute(f"DROP VIEW {view}")
    _uploads()
    _runs()
    _ledger()
    op.create_table(
        "engine_package",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("reference_ap50", sa.Double(), nullable=True),
        sa.Column("ap50", sa.Double(), nullable=True),
        sa.Column("pictures", sa.Integer(), nullable=False),
        sa.Column("milliseconds", sa.Double(), nullable=True),
        sa.Column("reference_milliseconds", sa.Double(), nullable=True),
        sa.Column("files", postgresql.JSONB(), nullable=False),
        sa.Column("toolchain", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_version.id"], name=op.f("fk_engine_package_model_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_engine_package")),
        sa.UniqueConstraint("model_id", "engine", name=op.f("uq_engine_package_model_id")),
    )
    op.create_table(
        "upload_watch",
        sa.Column("bucket", sa.String(), nullable=False),
        sa.Column("upload_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("bucket", name=op.f("pk_upload_watch")),
    )
    for statement in _VIEWS:
        op.execute(statement)


def _uploads() -> None:
    for name in ("current", "pending"):
        op.add_column(
            "upload",
            sa.Column(name, sa.Boolean(), server_default=sa.text("true"), nullable=False),
        )
    op.execute(
        """
        UPDATE upload u SET
            current = NOT EXISTS (
                SELECT FROM upload o WHERE o.bucket = u.bucket AND o.key = u.key
                AND (o.last_seen_at, o.id) > (u.last_seen_at, u.id)
            ),
            pending = NOT EXISTS (SELECT FROM ledger l WHERE l.upload_id = u.id)
        """
    )
    op.execute("UPDATE upload SET pending = false WHERE NOT current")
    op.drop_column("upload", "last_seen_at")
    # Nothing asks by these alone, and every row pays for them.
    op.drop_index("ix_upload_uploaded_at", "upload")
    op.drop_index("ix_ledger_model_id", "ledger")
    op.create_index(
        "uq_upload_current",
        "upload",
        ["bucket", "key"],
        unique=True,
        postgresql_where=sa.text("current"),
    )
    op.create_index(
        "ix_upload_pending",
        "upload",
        ["bucket", "uploaded_at"],
        postgresql_where=sa.text("pending"),
    )


def _runs() -> None:
    op.add_column(
        "scoring_run", sa.Column("kind", sa.String(), server_default="new", nullable=False)
    )
    op.create_check_constraint(
        op.f("ck_scoring_run_kind"), "scoring_run", "kind IN ('new', 'rescore')"
    )
    op.add_column(
        "scoring_run",
        sa.Column("survey", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
    )
    op.add_column("scoring_run", sa.Column("stats", postgresql.JSONB(), nullable=True))
    for name in ("scored", "quarantined", "detections"):
        op.add_column("scoring_run", sa.Column(name, sa.Integer(), nullable=True))
    for name, kind in (
        ("bytes", sa.BigInteger()),
        ("crashes", sa.Integer()),
        ("suspect_crashes", sa.Integer()),
    ):
        op.add_column("shard", sa.Column(name, kind, server_default="0", nullable=False))
    op.add_column("shard", sa.Column("suspect_id", sa.BigInteger(), nullable=True))
    op.add_column("shard", sa.Column("stats", postgresql.JSONB(), nullable=True))


def _ledger() -> None:
    op.add_column("ledger", sa.Column("engine", sa.String(), nullable=True))
    op.add_column(
        "ledger", sa.Column("stale", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.add_column("ledger", sa.Column("tries", sa.Integer(), server_default="1", nullable=False))
    op.create_index(
        "ix_ledger_quarantined",
        "ledger",
        ["upload_id"],
        postgresql_where=sa.text("reason IS NOT NULL"),
    )


# Columns of the views are a contract with integrators: they are added to, never changed.
_VIEWS = [
    """
    CREATE VIEW current_uploads AS
    SELECT id AS upload_id, bucket, key, etag, size, uploaded_at, first_seen_at
    FROM upload WHERE current
    """,
    # By the champion; until it has looked at an upload, by whoever did last.
    """
    CREATE VIEW current_outcomes AS
    SELECT u.upload_id, u.bucket, u.key, u.etag, u.uploaded_at, l.model_id, l.run_id,
           l.outcome, l.reason, l.message, l.sha256, l.width, l.height, l.created_at AS scored_at,
           l.id AS ledger_id, l.model_id = c.model_id AS by_champion, l.tries, l.engine
    FROM current_uploads u
    CROSS JOIN current_champion c
    JOIN LATERAL (
        SELECT * FROM ledger WHERE upload_id = u.upload_id
        ORDER BY model_id = c.model_id DESC, id DESC LIMIT 1
    ) l ON true
    """,
    """
    CREATE VIEW current_detections AS
    SELECT d.id AS detection_id, o.bucket, o.key, o.etag, o.sha256, o.width, o.height,
           d.x1, d.y1, d.x2, d.y2, d.score, o.model_id, m.threshold, o.scored_at,
           COALESCE(r.verdict, 'unreviewed') AS review_state,
           r.reviewer, r.created_at AS reviewed_at, o.by_champion
    FROM current_outcomes o
    JOIN model_version m ON m.id = o.model_id
    JOIN detection d ON d.ledger_id = o.ledger_id AND d.score >= m.threshold
    LEFT JOIN LATERAL (
        SELECT verdict, reviewer, created_at FROM review
        WHERE detection_id = d.id ORDER BY id DESC LIMIT 1
    ) r ON true
    """,
    """
    CREATE VIEW unscored_uploads AS
    SELECT id AS upload_id, bucket, key, etag, size, uploaded_at, first_seen_at
    FROM upload WHERE current AND pending
    """,
    # Scored, but not by the champion: what re-scoring is about.
    """
    CREATE VIEW outdated_uploads AS
    SELECT u.id AS upload_id, u.bucket, u.key, u.etag, u.size, u.uploaded_at, u.first_seen_at
    FROM upload u CROSS JOIN current_champion c
    WHERE u.current AND NOT u.pending AND NOT EXISTS (
        SELECT FROM ledger l WHERE l.upload_id = u.id AND l.model_id = c.model_id
    )
    """,
    """
    CREATE VIEW scoring_freshness AS
    SELECT bucket, COUNT(*) AS unscored, MIN(uploaded_at) AS oldest_upload,
           EXTRACT(EPOCH FROM now() - MIN(uploaded_at))::float AS oldest_seconds
    FROM unscored_uploads GROUP BY bucket
    """,
    # From what was ever quarantined, which is little, and not from every upload there is.
    """
    CREATE VIEW quarantine AS
    SELECT u.bucket, u.key, u.etag, l.sha256, l.reason, l.message, l.tries,
           u.first_seen_at, l.created_at AS scored_at, l.run_id, l.model_id,
           u.id AS upload_id, l.id AS ledger_id
    FROM current_champion c
    CROSS JOIN (SELECT DISTINCT upload_id FROM ledger WHERE reason IS NOT NULL) q
    JOIN upload u ON u.id = q.upload_id AND u.current
    JOIN LATERAL (
        SELECT * FROM ledger WHERE upload_id = u.id
        ORDER BY model_id = c.model_id DESC, id DESC LIMIT 1
    ) l ON l.reason IS NOT NULL
    """,
    """
    CREATE VIEW scoring_summary AS
    SELECT s.id AS run_id, s.created_at, s.finished_at, s.state, s.model_id, s.bucket, s.prefix,
           s.threshold, s.planned, s.left_over,
           COUNT(l.id) FILTER (WHERE l.outcome = 'scored') AS scored,
           COUNT(l.id) FILTER (WHERE l.outcome = 'quarantined') AS quarantined,
           COUNT(l.id) FILTER (WHERE n.detections > 0) AS images_with_detections,
           COALESCE(SUM(n.detections), 0)::bigint AS detections, s.kind
    FROM scoring_run s
    LEFT JOIN ledger l ON l.run_id = s.id
    LEFT JOIN LATERAL (
        SELECT COUNT(*) AS detections FROM detection d
        WHERE d.ledger_id = l.id AND d.score >= s.threshold
    ) n ON true
    GROUP BY s.id
    """,
]
