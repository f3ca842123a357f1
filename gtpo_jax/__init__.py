"""Group Turn Policy Optimization in JAX: reasoning with a Python tool over several turns."""

__version__ = "0.1.0"
