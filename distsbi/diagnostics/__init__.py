"""How good is a posterior: scores against references, and calibration on pairs that were held out."""

from distsbi.diagnostics.c2st import c2st as c2st
from distsbi.diagnostics.calibration import Calibration as Calibration, check_calibration as check_calibration
from distsbi.diagnostics.distance import distance as distance, sliced_wasserstein as sliced_wasserstein
