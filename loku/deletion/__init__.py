"""``loku forget``: from a deletion request to a record of what was done, and a model that can be served."""
