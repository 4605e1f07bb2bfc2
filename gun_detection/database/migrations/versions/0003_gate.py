"""Keep what a gate decision rests on, who approved, and what retention deleted; show history."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("gate_decision", sa.Column("policy", postgresql.JSONB(), nullable=True))
    op.add_column("gate_decision", sa.Column("origin", sa.String(), nullable=True))
    for name in ("candidate_evaluation_id", "champion_evaluation_id"):
        op.add_column("gate_decision", sa.Column(name, sa.BigInteger(), nullable=True))
        op.create_foreign_key(
            op.f(f"fk_gate_decision_{name}"), "gate_decision", "evaluation", [name], ["id"]
        )
    op.create_index(op.f("ix_gate_decision_origin"), "gate_decision", ["origin"])
    op.add_column(
        "model_version", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.create_table(
        "approval",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("gate_decision_id", sa.BigInteger(), nullable=False),
        sa.Column("approved", sa.Boolean(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("comment", sa.String(), server_default=sa.text("''"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approval")),
        sa.ForeignKeyConstraint(
            ["gate_decision_id"],
            ["gate_decision.id"],
            name=op.f("fk_approval_gate_decision_id"),
        ),
        sa.UniqueConstraint("gate_decision_id", name=op.f("uq_approval_gate_decision_id")),
    )
    op.execute(_OLD_VERDICTS)
    for table in ("gate_decision", "approval"):
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
    for statement in _VIEWS:
        op.execute(statement)


# Rules were (name, value, limit, passed) before, all of them floors.
_OLD_VERDICTS = """
    UPDATE gate_decision SET rules = (
        SELECT COALESCE(jsonb_agg(jsonb_build_object(
            'rule', r->>'name', 'value', r->'value', 'interval', NULL, 'limit', r->'limit',
            'at_most', false,
            'outcome', CASE WHEN (r->>'passed')::boolean THEN 'passed' ELSE 'failed' END,
            'blocks', NOT (r->>'passed')::boolean, 'note', ''
        ) ORDER BY n), '[]'::jsonb)
        FROM jsonb_array_elements(rules) WITH ORDINALITY AS old(r, n)
    )
"""


_VIEWS = [
    # From when until when each model was champion.
    """
    CREATE VIEW champion_history AS
    SELECT p.id AS promotion_id, p.model_id, p.kind, p.actor, p.reason,
           p.gate_decision_id, p.previous_id, p.created_at AS since,
           LEAD(p.created_at) OVER (ORDER BY p.id) AS until
    FROM promotion p
    """,
    """
    CREATE VIEW model_states AS
    SELECT m.id AS model_id, m.created_at, m.architecture, m.dataset_id, m.parent_id,
           m.code_version, m.threshold, m.deleted_at,
           CASE
               WHEN c.model_id IS NOT NULL THEN 'champion'
               WHEN h.champion_since IS NOT NULL THEN 'previous champion'
               WHEN g.id IS NULL THEN 'candidate'
               WHEN NOT g.passed OR a.approved = false THEN 'rejected'
               ELSE 'passed'
           END AS state,
           h.champion_since, h.champion_until,
           g.id AS gate_decision_id, g.created_at AS judged_at, g.passed,
           a.approved, a.actor AS approver, a.comment AS approval_comment,
           e.ap50 AS holdout_ap50, e.report_key
    FROM model_version m
    LEFT JOIN current_champion c ON c.model_id = m.id
    LEFT JOIN LATERAL (
        SELECT MIN(since) AS champion_since,
               CASE WHEN c.model_id IS NULL THEN MAX(until) END AS champion_until
        FROM champion_history WHERE model_id = m.id
    ) h ON true
    LEFT JOIN LATERAL (
        SELECT * FROM gate_decision WHERE candidate_id = m.id ORDER BY id DESC LIMIT 1
    ) g ON true
    LEFT JOIN approval a ON a.gate_decision_id = g.id
    LEFT JOIN LATERAL (
        SELECT (metrics->>'ap50')::float AS ap50, report_key
        FROM evaluation WHERE model_id = m.id AND split = 'holdout' ORDER BY id DESC LIMIT 1
    ) e ON true
    """,
]
