"""The policies every adapter is tested on: real LeRobot classes and processors, tiny random weights.

A new family joins the conformance suite with a module `families_<name>.py` that holds its `FAMILIES`.
"""

import families_act
import families_openpi
import families_pi0_fast
import families_smolvla

FAMILIES = (
    *families_smolvla.FAMILIES,
    *families_openpi.FAMILIES,
    *families_pi0_fast.FAMILIES,
    *families_act.FAMILIES,
)
