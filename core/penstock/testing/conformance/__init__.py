"""Check that an implementation keeps what a protocol of ``penstock.governance`` promises.

Each module holds the checks of one protocol, functions that take what opens an implementation and raise AssertionError:
``object_store.check_object_store``, ``vault.check_vault``. A store of your own proves itself with them.
"""
