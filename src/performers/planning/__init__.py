"""Which setting to take: error and time measured on sample queries and keys."""

from performers.planning.diagnosis import Diagnosis, FeatureVariance
from performers.planning.planner import plan
from performers.planning.result import Plan
from performers.planning.settings import Setting

__all__ = ["Diagnosis", "FeatureVariance", "Plan", "Setting", "plan"]
