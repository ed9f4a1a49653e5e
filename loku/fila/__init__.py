"""FILA, in the order of its steps.

``settings`` has the choices. ``targets`` chooses the modules. ``measured_rows`` chooses the rows,
``row_scales`` measures the modules' Fisher information on them, and ``row_scale_cache`` keeps it on disk.
``initialize`` makes the adapter of ``factors``, and ``originals`` copies the weights that it overwrites.
"""
