"""The commands of ``loku``: each module has ``add(commands)``, which adds the parser of one."""
