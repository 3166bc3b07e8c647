"""Names the options for images that a user has set and that the chosen loss does not read.

The trainer, TRL and verl all say this, so that no option is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cppo.options.loss import REMOVING
from cppo.options.trainer import CPPOConfig, LossConfig


def without_effect(
    loss: LossConfig,
    positive_views: Iterable[Any],
    negative_views: Iterable[Any],
    *,
    of_loss: str = "loss.",
    of_views: str = "",
) -> str:
    """Return a sentence that names the options without an effect; "" if all have one.

    Args:
        of_loss, of_views: a prefix of the names, which says where the user has set them.
    """
    names = [of_loss + name for name in loss.idle_options]
    views = {"positive": positive_views, "negative": negative_views}
    for view, given in views.items():
        is_set = tuple(given) != getattr(CPPOConfig, f"{view}_views")
        if is_set and view not in loss.perturbed_views:
            names.append(f"{of_views}{view}_views")
    if not names:
        return ""
    how = f"{of_loss}perception = {loss.perception!r} and {of_loss}cpl_coef = {loss.cpl_coef:g}"
    words = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect with {how}"
    if loss.contrasts or loss.perception in REMOVING:
        return words
    on = f"{of_loss}cpl_coef = {LossConfig.cpl_coef:g}"
    return f"{words}; {on} turns contrastive perception on"
