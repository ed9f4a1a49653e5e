"""FILA, in the order of its steps.

``targets`` says which modules, ``row_scales`` measures their Fisher and ``row_scale_cache`` keeps it, and
``initialize`` makes the adapter.
"""
