"""The version, in the one place that the build, ``fuselora.__version__`` and the environment report read."""

__version__ = "0.1.0"
