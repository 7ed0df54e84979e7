"""ptr_hf: post-train LeRobot policies on uneven demonstrations (Posterior-Transition Reweighting)."""
