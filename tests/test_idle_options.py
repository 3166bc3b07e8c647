"""What is set of images and not read by the loss is told."""

import pytest

from cppo.options.idle import without_effect
from cppo.options.trainer import CPPOConfig, LossConfig

VIEWS = CPPOConfig.positive_views, CPPOConfig.negative_views
TWO = (("rotation",), ("zoom_crop",))


@pytest.mark.parametrize(
    ("loss", "views", "words"),
    [
        (dict(cpl_coef=0.0), VIEWS, None),
        (dict(tau=0.5), TWO, None),
        (dict(perception="papo", papo_coef=0.5), (VIEWS[0], TWO[1]), None),
        (
            dict(cpl_coef=0.0, gating=False, perception="cpl_all"),
            TWO,
            "l.perception, l.gating, positive_views, negative_views have no effect with "
            "l.perception = 'cpl_all' and l.cpl_coef = 0; l.cpl_coef = 0.01 turns contrastive "
            "perception on",
        ),
        (
            dict(perception="vppo", vppo_floor=0.5, papo_coef=1.0, tau=0.2),
            TWO,
            "l.tau, l.papo_coef, positive_views have no effect with l.perception = 'vppo' and "
            "l.cpl_coef = 0.01",
        ),
        (
            dict(vppo_fraction=0.5),
            VIEWS,
            "l.vppo_fraction has no effect with l.perception = 'cpl' and l.cpl_coef = 0.01",
        ),
    ],
)
def test_options_of_images_that_have_no_effect_are_told(loss, views, words):
    assert without_effect(LossConfig(**loss), *views, of_loss="l.") == (words or "")
