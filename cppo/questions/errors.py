"""The error of one row."""

from __future__ import annotations


class QuestionError(ValueError):
    """One row of a dataset cannot be asked; the other rows are not concerned.

    Raised where the row is taken (a malformed prompt, an image that cannot be read) and where it is
    encoded (a role that the chat template refuses, an image that the processor refuses). The
    message names the row.
    """
