"""What the command lines share; `first_look`, `interrupts` and `option_names` import neither torch nor LeRobot."""
