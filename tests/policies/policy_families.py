"""The policies every adapter is tested on: real LeRobot classes and processors, tiny random weights.

A new family joins the conformance suite with a module `families_<name>.py` that holds its `FAMILIES`.
"""

import families_act
import families_diffusion
import families_evo1
import families_groot
import families_multi_task_dit
import families_openpi
import families_pi0_fast
import families_smolvla
import families_vla_jepa
import families_xvla

FAMILIES = (
    *families_smolvla.FAMILIES,
    *families_openpi.FAMILIES,
    *families_pi0_fast.FAMILIES,
    *families_act.FAMILIES,
    *families_diffusion.FAMILIES,
    *families_multi_task_dit.FAMILIES,
    *families_xvla.FAMILIES,
    *families_evo1.FAMILIES,
    *families_groot.FAMILIES,
    *families_vla_jepa.FAMILIES,
)
