"""Saving: the portable ``adapter``, whole ``models``, and ``directories`` that are whole or absent."""
