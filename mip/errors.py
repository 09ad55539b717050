"""Errors a user can act on. Each message says what was given, what was expected and what to do.

    MipError
    ├── ConfigError       parameters that are unknown, missing, of a wrong type or in conflict
    ├── DataError         files that are missing or not what they should be
    │   └── SchemaError   a table of another kind or version
    ├── CheckpointError   weights that do not fit the model, or may not be read
    ├── ReferencesError   references that contradict the prompt or one another
    └── TrainingError     training that cannot go on

A command ends on one of these with a single line and exit code 2.
"""


class MipError(Exception):
    """Anything a user can put right."""


class ConfigError(MipError):
    """A parameter is unknown, missing, of a wrong type or in conflict with another."""


class DataError(MipError):
    """A file is missing or not what it should be."""


class SchemaError(DataError):
    """A table is of another kind, or of a version that this code does not read."""


class CheckpointError(MipError):
    """Weights do not fit the model, or may not be read."""


class ReferencesError(MipError):
    """References contradict the prompt or one another."""


class TrainingError(MipError):
    """Training cannot go on: the loss is no number for several steps in a row."""
