"""The roof: the ``trunkline`` command, its flags, the supervisor and the embedded broker.

The only package that imports the others. Begin with options.py, where every flag is, then cli.py and supervisor.py.
"""
