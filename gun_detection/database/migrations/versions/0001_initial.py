"""Create the tables, and the read-only views for integrators."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dataset_version",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.Column("boxes", sa.Integer(), nullable=False),
        sa.Column("negatives", sa.Integer(), nullable=False),
        sa.Column("train_images", sa.Integer(), nullable=False),
        sa.Column("validation_images", sa.Integer(), nullable=False),
        sa.Column("holdout_images", sa.Integer(), nullable=False),
        sa.Column("rejected_images", sa.Integer(), nullable=False),
        sa.Column("rejected_boxes", sa.Integer(), nullable=False),
        sa.Column("duplicates", sa.Integer(), nullable=False),
        sa.Column("manifest_key", sa.String(), nullable=False),
        sa.Column("report_key", sa.String(), nullable=False),
        sa.Column("holdout_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_version")),
    )
    op.create_index(
        op.f("ix_dataset_version_holdout_id"), "dataset_version", ["holdout_id"], unique=False
    )
    op.create_table(
        "upload",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "first_seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "last_seen_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("bucket", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("etag", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("uploaded_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload")),
        sa.UniqueConstraint("bucket", "key", "etag", name=op.f("uq_upload_bucket")),
    )
    op.create_index(op.f("ix_upload_uploaded_at"), "upload", ["uploaded_at"], unique=False)
    op.create_table(
        "model_version",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("architecture", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=True),
        sa.Column("parent_id", sa.String(), nullable=True),
        sa.Column("config", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("config_hash", sa.String(), nullable=False),
        sa.Column("code_version", sa.String(), nullable=False),
        sa.Column("weights_key", sa.String(), nullable=False),
        sa.Column("weights_sha256", sa.String(), nullable=False),
        sa.Column("threshold", sa.Double(), nullable=False),
        sa.Column("training", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["dataset_version.id"], name=op.f("fk_model_version_dataset_id")
        ),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["model_version.id"], name=op.f("fk_model_version_parent_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_version")),
    )
    op.create_index(
        op.f("ix_model_version_config_hash"), "model_version", ["config_hash"], unique=False
    )
    op.create_index(
        op.f("ix_model_version_dataset_id"), "model_version", ["dataset_id"], unique=False
    )
    op.create_table(
        "evaluation",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("holdout_id", sa.String(), nullable=False),
        sa.Column("split", sa.String(), nullable=False),
        sa.Column("evaluator_version", sa.String(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("report_key", sa.String(), nullable=False),
        sa.CheckConstraint("split IN ('validation', 'holdout')", name=op.f("ck_evaluation_split")),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["dataset_version.id"], name=op.f("fk_evaluation_dataset_id")
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_version.id"], name=op.f("fk_evaluation_model_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluation")),
        sa.UniqueConstraint(
            "model_id",
            "dataset_id",
            "split",
            "evaluator_version",
            name=op.f("uq_evaluation_model_id"),
        ),
    )
    op.create_index(op.f("ix_evaluation_dataset_id"), "evaluation", ["dataset_id"], unique=False)
    op.create_index(op.f("ix_evaluation_holdout_id"), "evaluation", ["holdout_id"], unique=False)
    op.create_table(
        "gate_decision",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("candidate_id", sa.String(), nullable=False),
        sa.Column("champion_id", sa.String(), nullable=True),
        sa.Column("holdout_id", sa.String(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("rules", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["candidate_id"], ["model_version.id"], name=op.f("fk_gate_decision_candidate_id")
        ),
        sa.ForeignKeyConstraint(
            ["champion_id"], ["model_version.id"], name=op.f("fk_gate_decision_champion_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gate_decision")),
    )
    op.create_index(
        op.f("ix_gate_decision_candidate_id"), "gate_decision", ["candidate_id"], unique=False
    )
    op.create_table(
        "scoring_run",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("bucket", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("threshold", sa.Double(), nullable=False),
        sa.Column("planned", sa.Integer(), nullable=False),
        sa.Column("left_over", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), server_default="open", nullable=False),
        sa.CheckConstraint(
            "state IN ('open', 'finished', 'failed')", name=op.f("ck_scoring_run_state")
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_version.id"], name=op.f("fk_scoring_run_model_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scoring_run")),
    )
    op.create_table(
        "promotion",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("previous_id", sa.String(), nullable=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("gate_decision_id", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("kind IN ('promote', 'rollback')", name=op.f("ck_promotion_kind")),
        sa.ForeignKeyConstraint(
            ["gate_decision_id"], ["gate_decision.id"], name=op.f("fk_promotion_gate_decision_id")
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_version.id"], name=op.f("fk_promotion_model_id")
        ),
        sa.ForeignKeyConstraint(
            ["previous_id"], ["model_version.id"], name=op.f("fk_promotion_previous_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotion")),
    )
    op.create_table(
        "shard",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("upload_ids", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["scoring_run.id"], name=op.f("fk_shard_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shard")),
        sa.UniqueConstraint("run_id", "number", name=op.f("uq_shard_run_id")),
    )
    op.create_table(
        "ledger",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("upload_id", sa.BigInteger(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("shard_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("message", sa.String(), nullable=True),
        sa.Column("sha256", sa.String(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("decode_ms", sa.Double(), nullable=True),
        sa.Column("inference_ms", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "(outcome = 'quarantined') = (reason IS NOT NULL)", name=op.f("ck_ledger_reason")
        ),
        sa.CheckConstraint("outcome IN ('scored', 'quarantined')", name=op.f("ck_ledger_outcome")),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model_version.id"], name=op.f("fk_ledger_model_id")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["scoring_run.id"], name=op.f("fk_ledger_run_id")),
        sa.ForeignKeyConstraint(["shard_id"], ["shard.id"], name=op.f("fk_ledger_shard_id")),
        sa.ForeignKeyConstraint(["upload_id"], ["upload.id"], name=op.f("fk_ledger_upload_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger")),
        sa.UniqueConstraint("upload_id", "model_id", name=op.f("uq_ledger_upload_id")),
    )
    op.create_index(op.f("ix_ledger_model_id"), "ledger", ["model_id"], unique=False)
    op.create_index(op.f("ix_ledger_run_id"), "ledger", ["run_id"], unique=False)
    op.create_index("ix_ledger_sha256_model", "ledger", ["sha256", "model_id"], unique=False)
    op.create_table(
        "detection",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("ledger_id", sa.BigInteger(), nullable=False),
        sa.Column("x1", sa.Double(), nullable=False),
        sa.Column("y1", sa.Double(), nullable=False),
        sa.Column("x2", sa.Double(), nullable=False),
        sa.Column("y2", sa.Double(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.CheckConstraint("x2 > x1 AND y2 > y1", name=op.f("ck_detection_box")),
        sa.ForeignKeyConstraint(
            ["ledger_id"], ["ledger.id"], name=op.f("fk_detection_ledger_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_detection")),
    )
    op.create_index(op.f("ix_detection_ledger_id"), "detection", ["ledger_id"], unique=False)
    op.create_table(
        "review",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("detection_id", sa.BigInteger(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("reviewer", sa.String(), nullable=False),
        sa.Column("comment", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.CheckConstraint("verdict IN ('confirmed', 'rejected')", name=op.f("ck_review_verdict")),
        sa.ForeignKeyConstraint(
            ["detection_id"], ["detection.id"], name=op.f("fk_review_detection_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_review")),
    )
    op.create_index(op.f("ix_review_detection_id"), "review", ["detection_id"], unique=False)
    for statement in _STATEMENTS:
        op.execute(statement)


# Columns of the views are a contract with integrators: they are added to, never changed.
_STATEMENTS = [
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only: add a row instead', TG_TABLE_NAME;
    END $$
    """,
    """
    CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON promotion
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON review
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
    """
    CREATE VIEW current_champion AS
    SELECT m.id AS model_id, m.architecture, m.dataset_id, m.threshold,
           p.created_at AS since, p.kind, p.actor, p.reason
    FROM promotion p JOIN model_version m ON m.id = p.model_id
    ORDER BY p.id DESC LIMIT 1
    """,
    # The newest version of each key; older versions of a key that was overwritten are history.
    """
    CREATE VIEW current_uploads AS
    SELECT DISTINCT ON (bucket, key)
           id AS upload_id, bucket, key, etag, size, uploaded_at, first_seen_at
    FROM upload ORDER BY bucket, key, uploaded_at DESC, id DESC
    """,
    """
    CREATE VIEW current_outcomes AS
    SELECT u.upload_id, u.bucket, u.key, u.etag, u.uploaded_at, l.model_id, l.run_id,
           l.outcome, l.reason, l.message, l.sha256, l.width, l.height, l.created_at AS scored_at,
           l.id AS ledger_id
    FROM current_uploads u
    CROSS JOIN current_champion c
    JOIN ledger l ON l.upload_id = u.upload_id AND l.model_id = c.model_id
    """,
    """
    CREATE VIEW current_detections AS
    SELECT d.id AS detection_id, o.bucket, o.key, o.etag, o.sha256, o.width, o.height,
           d.x1, d.y1, d.x2, d.y2, d.score, o.model_id, c.threshold, o.scored_at,
           COALESCE(r.verdict, 'unreviewed') AS review_state,
           r.reviewer, r.created_at AS reviewed_at
    FROM current_outcomes o
    CROSS JOIN current_champion c
    JOIN detection d ON d.ledger_id = o.ledger_id AND d.score >= c.threshold
    LEFT JOIN LATERAL (
        SELECT verdict, reviewer, created_at FROM review
        WHERE detection_id = d.id ORDER BY id DESC LIMIT 1
    ) r ON true
    """,
    """
    CREATE VIEW unscored_uploads AS
    SELECT u.* FROM current_uploads u
    WHERE NOT EXISTS (
        SELECT FROM ledger l JOIN current_champion c ON l.model_id = c.model_id
        WHERE l.upload_id = u.upload_id
    )
    """,
    """
    CREATE VIEW scoring_summary AS
    SELECT s.id AS run_id, s.created_at, s.finished_at, s.state, s.model_id, s.bucket, s.prefix,
           s.threshold, s.planned, s.left_over,
           COUNT(l.id) FILTER (WHERE l.outcome = 'scored') AS scored,
           COUNT(l.id) FILTER (WHERE l.outcome = 'quarantined') AS quarantined,
           COUNT(l.id) FILTER (WHERE n.detections > 0) AS images_with_detections,
           COALESCE(SUM(n.detections), 0)::bigint AS detections
    FROM scoring_run s
    LEFT JOIN ledger l ON l.run_id = s.id
    LEFT JOIN LATERAL (
        SELECT COUNT(*) AS detections FROM detection d
        WHERE d.ledger_id = l.id AND d.score >= s.threshold
    ) n ON true
    GROUP BY s.id
    """,
]
