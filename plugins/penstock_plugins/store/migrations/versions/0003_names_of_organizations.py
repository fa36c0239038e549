"""Have names that were unique in the whole store be unique in their organization."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Put the organization in front of handles, external ids and names of budgets; prices' are the installation's."""
    op.execute(
        """
        UPDATE unique_values SET value =
            (SELECT '["' || objects.organization_id || '",' FROM objects
             WHERE objects.kind = unique_values.kind AND objects.id = unique_values.id) || substr(value, 2)
        WHERE (name IN ('external_id', 'handle') AND kind <> 'price_override') OR (kind = 'budget' AND name = 'name')
        """
    )
