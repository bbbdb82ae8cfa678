"""Random features whose inner products estimate a kernel."""

from performers.features.base import FeatureMap
from performers.features.form import FeatureForm
from performers.features.generalized import FUNCTIONS, GeneralizedFeatures
from performers.features.learned import LearnedFeatures
from performers.features.projections import PROJECTIONS, draw_projection
from performers.features.proposal import CALIBRATED
from performers.features.redraw import FeatureRedrawer, redraw_features_
from performers.features.softmax import ESTIMATORS, SoftmaxFeatures

__all__ = [
    "CALIBRATED",
    "ESTIMATORS",
    "FUNCTIONS",
    "PROJECTIONS",
    "FeatureForm",
    "FeatureMap",
    "FeatureRedrawer",
    "GeneralizedFeatures",
    "LearnedFeatures",
    "SoftmaxFeatures",
    "draw_projection",
    "redraw_features_",
]
