"""One policy for five arms, or one for each? Robosuite's Lift (docs/embodiment.md)."""
