"""`cppo.inspect`: what a vision-language model looks at."""

from cppo.inspection.looking import inspect
from cppo.inspection.record import Answer, Inspection, Token

__all__ = ["Answer", "Inspection", "Token", "inspect"]
