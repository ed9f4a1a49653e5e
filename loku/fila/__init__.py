"""FILA, in the order of its steps.

``targets`` chooses the modules. ``row_scales`` measures their Fisher information, and ``row_scale_cache``
keeps it on disk. ``initialize`` makes the adapter, and ``originals`` copies the weights that it overwrites.
"""
