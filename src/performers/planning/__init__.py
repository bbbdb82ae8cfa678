"""`plan`: error and time of attention measured on sample queries and keys."""

from performers.planning.diagnosis import Diagnosis, FeatureVariance
from performers.planning.planner import Plan, plan
from performers.planning.settings import Setting

__all__ = ["Diagnosis", "FeatureVariance", "Plan", "Setting", "plan"]
