"""Run migrations on the connection, and in the transaction, that ``store.schema`` gives."""

from alembic import context

from penstock_plugins.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
