"""``penstock``'s commands for the management plane: everything goes through the REST API of a running gateway."""
